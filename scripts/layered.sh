# Sourced by scripts that need other versions of some packages: `layered_environment DIRECTORY REQUIREMENT...` makes a
# virtual environment that has these over everything that `$python` has (torch above all, which is shared, not copied),
# and sets `layered_python` to its interpreter. Made once; made anew when the requirements change.

layered_environment() {
    local directory=$1 stamp=$1/npu_patch.stamp wanted
    shift
    layered_python=$directory/bin/python
    wanted="$*, over $("$python" -c 'import importlib.metadata, sys; print(sys.prefix, importlib.metadata.version("torch"))')"
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
    rm -rf "$directory"
    "$python" -m venv --without-pip "$directory" || fail "no virtual environment at $directory: apt-get install python3-venv"
    # Behind the environment's own packages, so these win.
    "$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
        >"$(site_packages)/behind.pth"
    echo "environment: $directory: pip install $*" >&2
    # The versions of everything that these packages do not ask for otherwise stay those of the shared environment.
    "$python" -m pip --python "$layered_python" install --quiet --disable-pip-version-check "$@" ||
        fail "pip install $* into $directory failed"
    echo "$wanted" >"$stamp"
}

site_packages() {
    "$layered_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}
