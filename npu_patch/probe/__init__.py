"""What a site computes, observed by running its original on a few small CPU tensors.

`room` is where probes run, `stand_in` what a method is called on, `closeness` how results are compared; one module
per op reads an original and says which variant of the op it computes, or none. No name of a model, a class or an
attribute decides anything.
"""
