"""Drafts over a static cache: the tokens of plain decoding, and one launch for each check of the model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import LogitsProcessor, StaticCache
from transformers.generation.candidate_generator import MTPCandidateGenerator

import npu_patch
from npu_patch import applied, simulator
from npu_patch.checkpoints.beside import write_beside
from npu_patch.commands.subject.vision.batches import padded
from npu_patch.commands.subject.vision.drawing import several
from npu_patch.commands.subject.vision.families import FAMILIES as WITH_PICTURES
from npu_patch.patches.inference.mtp.head import new_head, published_names
from tests.patches.inference.mtp.test_sampling import p_value, pairs
from tests.support.drafts import DRAFTS, drafting
from tests.support.generating import COMPARED, calls_of
from tests.support.heads import FAMILIES, GREEDY, loaded, prompt, saved
from tests.support.tiny_models import tiny
from tests.support.vision_cases import FULL, made

DRAWS = 100
STATIC = {**GREEDY, "cache_implementation": "static"}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_tokens_are_those_of_plain_decoding_whatever_is_drafted(
    family: str, kind: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 256 if family == "qwen3_next" else 64
    model, ids = tiny(family, max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=count, **GREEDY)
    model = model.to(npu)
    with applied(model, mtp=True):
        for _ in range(2):  # the second time over a cache and graphs that are there
            before = calls_of("_assisted_decoding").ran
            lengths = drafting(monkeypatch, plain, DRAFTS[kind])
            found = model.generate(ids.to(npu), max_new_tokens=count, prompt_lookup_num_tokens=3, **STATIC)
            assert torch.equal(found.cpu(), plain)
        calls = calls_of("_assisted_decoding")
        assert not calls.fell_through
        assert calls.ran - before >= len([each for each in lengths[1:] if each < 32]) - COMPARED


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_the_head_are_those_of_plain_decoding(
    family: str, drafts: int, npu: torch.device, tmp_path: Path
) -> None:
    model, ids = loaded(saved(family, tmp_path)), prompt()
    plain = model.generate(ids, max_new_tokens=32, **GREEDY)
    model = model.to(npu)
    with applied(model, mtp=True):
        given = {"max_new_tokens": 32, "use_mtp": True, "num_assistant_tokens": drafts, **STATIC}
        assert torch.equal(model.generate(ids.to(npu), **given).cpu(), plain)
        calls = calls_of("_assisted_decoding")
        assert calls.ran > 20 - COMPARED and not calls.fell_through


@pytest.mark.parametrize("drafts", [1, 2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_head_drafts_what_it_drafts_step_by_step(
    family: str, drafts: int, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long prompt, and one that is shorter than what a replay is given; of what was accepted, and of what was
    not: its tokens are replaced by the model's now and then."""
    model = loaded(saved(family, tmp_path)).to(npu)
    plain = {tokens: model.generate(prompt(tokens).to(npu), max_new_tokens=24, **GREEDY) for tokens in (3, 17)}
    with applied(model, mtp=True) as report:
        drafted: list[list[int]] = []
        original = MTPCandidateGenerator.get_candidates

        def get_candidates(self: Any, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found, logits = original(self, ids, *args, **kwargs)
            drafted.append(found[0].tolist())
            rest = plain[tokens][:, ids.shape[1] : found.shape[1]]
            if len(drafted) % 3 and rest.shape[1]:  # some of them right
                found[:, ids.shape[1] : ids.shape[1] + rest.shape[1]] = rest
            return found, logits

        monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", get_candidates)
        for tokens in plain:
            found = []
            for how in (GREEDY, STATIC, STATIC):
                drafted.clear()
                given = {"max_new_tokens": 24, "use_mtp": True, "num_assistant_tokens": drafts, **how}
                assert torch.equal(model.generate(prompt(tokens).to(npu), **given), plain[tokens])
                found.append([*drafted])
            assert found[0] == found[1] == found[2] and len(found[0]) < 24
        (door,) = (each.calls for each in report if each.site.endswith("MTPCandidateGenerator.get_candidates"))
        assert door.ran >= 4 and not door.fell_through


@pytest.mark.parametrize("assistant", ["qwen3_next", "qwen3"])
@pytest.mark.parametrize("family", ["qwen3_next", "gemma3"])
def test_tokens_with_an_assistant_are_those_of_plain_decoding(family: str, assistant: str, npu: torch.device) -> None:
    model = tiny(family, max_position_embeddings=512, **({"sliding_window": 40} if family == "gemma3" else {}))
    plain = model.generate(prompt(), max_new_tokens=48, **GREEDY)
    other = tiny(assistant, max_position_embeddings=512, seed=0 if assistant == family else 3).to(npu)
    other.generation_config.num_assistant_tokens, other.generation_config.assistant_confidence_threshold = 4, 0.0
    model = model.to(npu)
    with applied(model, mtp=True), applied(other, mtp=True):
        found = model.generate(prompt().to(npu), max_new_tokens=48, assistant_model=other, **STATIC)
        assert torch.equal(found.cpu(), plain)
        assert calls_of("_assisted_decoding").ran and not calls_of("_assisted_decoding").fell_through


@pytest.mark.parametrize("how", [{"use_mtp": True, "num_assistant_tokens": 2}, {"prompt_lookup_num_tokens": 3}])
def test_tokens_after_a_prompt_with_pictures_are_those_of_plain_decoding(
    how: dict[str, Any], tmp_path: Path, npu: torch.device
) -> None:
    model = made("qwen3_5", FULL)
    model.save_pretrained(tmp_path)
    write_beside(tmp_path, published_names(new_head(model)), "mtp.safetensors")
    model = type(model).from_pretrained(tmp_path).eval()
    given = padded(model, WITH_PICTURES["qwen3_5"], [several((24, 40), (33, 17))])
    given.pop("labels", None)
    plain = model.generate(**given, max_new_tokens=32, use_cache=True, **GREEDY)
    model, given = model.to(npu), {name: each.to(npu) for name, each in given.items()}
    with applied(model, mtp=True):
        found = model.generate(**given, max_new_tokens=32, use_cache=True, **how, **STATIC)
        assert torch.equal(found.cpu(), plain)
        assert calls_of("_assisted_decoding").ran and not calls_of("_assisted_decoding").fell_through


@pytest.mark.parametrize(
    "options",
    [
        {"eos_token_id": 37},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ],
    ids=str,
)
def test_what_ends_or_changes_a_generation_does_so_as_over_a_dynamic_cache(
    options: dict[str, Any], npu: torch.device
) -> None:
    model, ids = tiny("qwen3_5", max_position_embeddings=512).to(npu), prompt().repeat(1, 2).to(npu)
    given = {"max_new_tokens": 48, **LOOKUP, **options}
    with applied(model, mtp=True):
        expected, found = (model.generate(ids, **{**how, **given}) for how in (GREEDY, STATIC))
    if "output_scores" in options:
        for name in ("scores", "logits"):
            torch.testing.assert_close(torch.cat(found[name]), torch.cat(expected[name]), rtol=1e-5, atol=1e-5)
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


def test_checks_are_replays_where_trl_is_imported(npu: torch.device) -> None:
    """Then logits of several tokens wait for who needs them, which a graph does not."""
    importlib.import_module("trl")
    model, ids = tiny("qwen3", max_position_embeddings=512).to(npu), prompt().repeat(1, 3).to(npu)
    with applied():
        importlib.import_module("trl.trainer.sft_trainer")
        plain = model.generate(ids, max_new_tokens=24, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=24, **LOOKUP, **STATIC), plain)
        assert calls_of("_assisted_decoding").ran and not calls_of("_assisted_decoding").fell_through


def test_padding_before_the_prompt_changes_nothing(npu: torch.device) -> None:
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt()
    ids = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = (torch.arange(13) >= 4).long()[None]
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=48, **GREEDY)
    model = model.to(npu)
    with applied(model, mtp=True):
        found = model.generate(ids.to(npu), attention_mask=mask.to(npu), max_new_tokens=48, **LOOKUP, **STATIC)
        assert torch.equal(found.cpu(), plain) and calls_of("_assisted_decoding").ran


def test_a_check_of_any_width_is_one_launch_beside_those_of_the_loop(
    npu: torch.device, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt()
    launches: dict[tuple[int, int], float] = {}
    for layers in (2, 4):
        kinds = ["linear_attention", "full_attention"] * (layers // 2)
        more = {"num_hidden_layers": layers, "layer_types": kinds}
        model = tiny("qwen3_next", max_position_embeddings=512, **more)
        plain = model.generate(ids, max_new_tokens=160, **GREEDY)
        model = model.to(npu)
        with applied(model, mtp=True):
            for drafts in (1, 3, 7):
                counted = []
                for count in (160, 80, 160):  # the first makes the cache
                    drafting(monkeypatch, plain, lambda rest, chance, drafts=drafts: rest[:drafts])
                    with simulator.count() as counts:
                        model.generate(ids.to(npu), max_new_tokens=count, prompt_lookup_num_tokens=drafts, **STATIC)
                    counted.append(counts)
                checks = counted[2].replays - counted[1].replays
                assert checks == 80 // (drafts + 1)
                launches[layers, drafts] = (counted[2].launches - counted[1].launches) / checks
    # The replay, tokens and positions to their places and a copy of the logits; the others are transformers' loop's.
    assert len(set(launches.values())) == 1 and launches[2, 1] <= 30, launches


def test_graphs_of_two_widths_are_made_of_one_cache(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wider check gives the states another place, which the narrower graph would not know."""
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=128, **GREEDY)
    model = model.to(npu)
    with applied(model, mtp=True):
        for _ in range(2):
            drafting(monkeypatch, plain, lambda rest, chance: rest[: 1 if len(rest) % 32 < 16 else 6])
            found = model.generate(ids.to(npu), max_new_tokens=128, prompt_lookup_num_tokens=6, **STATIC)
            assert torch.equal(found.cpu(), plain)
        assert not calls_of("_assisted_decoding").fell_through


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3"])
@pytest.mark.parametrize("captured", [True, False])
def test_a_cache_that_the_caller_gets_holds_what_was_accepted(family: str, captured: bool, npu: torch.device) -> None:
    """It goes on step by step, over several tokens, and captured; another loop of drafts refuses it."""
    model, ids = tiny(family, max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=60, **GREEDY)
    model, expected = model.to(npu), plain.to(npu)
    with applied(model, mtp=True, captured_decode=True):
        given = {"max_new_tokens": 20, "return_dict_in_generate": True, "prompt_lookup_num_tokens": 4}
        hook = None if captured else model.lm_head.register_forward_hook(lambda module, args, output: None)
        found = model.generate(ids.to(npu), max_matching_ngram_size=1, **STATIC, **given)
        assert int(found.past_key_values.get_seq_length()) == found.sequences.shape[1] - 1
        for more in (4, 1):  # tokens that it has not seen
            ids = expected[:, : found.sequences.shape[1] + more - 1]
            given = {"past_key_values": found.past_key_values, "return_dict_in_generate": True, **GREEDY}
            found = model.generate(ids, max_new_tokens=10, **given)
            assert torch.equal(found.sequences, expected[:, : found.sequences.shape[1]])
        with pytest.raises(ValueError, match="not supported with Static cache classes: this one is of another call"):
            model.generate(found.sequences, max_new_tokens=4, past_key_values=found.past_key_values, **LOOKUP, **GREEDY)
        if hook is not None:
            hook.remove()


class Listening(LogitsProcessor):  # type: ignore[misc]
    """Of a caller's: it may change the model between two checks."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 30:
            self.model.lm_head.weight = torch.nn.Parameter(-self.model.lm_head.weight.detach())
        return scores


def test_a_model_that_changes_between_checks_is_seen(npu: torch.device) -> None:
    found = []
    for how in (GREEDY, STATIC):
        model, ids = tiny("qwen3_next", max_position_embeddings=512).to(npu), prompt().to(npu)
        with applied(model, mtp=True):
            found.append(model.generate(ids, max_new_tokens=48, logits_processor=[Listening(model)], **LOOKUP, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3"])
def test_where_nothing_can_be_captured_checks_are_eager_and_the_report_says_why(family: str, npu: torch.device) -> None:
    model, ids = tiny(family, max_position_embeddings=512).to(npu), prompt().to(npu)
    heard: list[int] = []
    with applied(model, mtp=True):
        plain = model.generate(ids, max_new_tokens=32, **GREEDY)
        hook = model.lm_head.register_forward_hook(lambda module, args, output: heard.append(output.shape[1]))
        found = model.generate(ids, max_new_tokens=32, **LOOKUP, **STATIC)
        calls = calls_of("_assisted_decoding")
        assert torch.equal(found, plain) and heard and calls.ran == 0
        assert dict(calls.fell_through) == {"hooks on modules of the model": 1}
        hook.remove()
        assert torch.equal(model.generate(ids, max_new_tokens=32, **LOOKUP, **STATIC), plain) and calls.ran


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3"])
def test_of_longer_drafts_than_a_check_has_rows_the_first_are_taken(
    family: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt lookup drafts beyond max_length too, for which a cache has no room."""
    model, ids = tiny(family, max_position_embeddings=512), prompt(60)
    plain = model.generate(ids, max_new_tokens=140, **GREEDY)
    model = model.to(npu)
    lengths = drafting(monkeypatch, plain, lambda rest, chance: [*rest, *range(2, 90)])
    with applied(model, mtp=True):
        found = model.generate(ids.to(npu), max_new_tokens=140, prompt_lookup_num_tokens=100, **STATIC)
        assert torch.equal(found.cpu(), plain)
        assert max(lengths) > 200 and len(lengths) == 5 and not calls_of("_assisted_decoding").fell_through


@pytest.mark.filterwarnings("ignore")
def test_layers_on_several_devices_are_checked_step_by_step(npu: torch.device) -> None:
    """The CPU stands for the second device."""
    model, ids = tiny("qwen3", max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=24, **GREEDY)
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head"), "npu:0")
    model = dispatch_model(
        model, device_map={**places, "model.layers.1": "cpu", "model.norm": "cpu"}, main_device="cpu"
    )
    with applied(model):
        assert torch.equal(model.generate(ids.to(npu), max_new_tokens=24, **LOOKUP, **STATIC).cpu(), plain)
        assert calls_of("_assisted_decoding").fell_through.total() == 1


def test_what_could_not_be_captured_once_is_not_tried_again(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("qwen3", max_position_embeddings=512).to(npu), prompt().to(npu)
    original, forwards = type(model.model).forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forwards.append(torch.npu.is_current_stream_capturing())
        found = original(self, *args, **kwargs)
        float(found[0].sum())  # no graph can do that
        return found

    monkeypatch.setattr(type(model.model), "forward", forward)
    with applied(model, mtp=True):
        plain = model.generate(ids, max_new_tokens=16, **GREEDY)
        for captures in (1, 0):
            forwards.clear()
            assert torch.equal(model.generate(ids, max_new_tokens=16, **LOOKUP, **STATIC), plain)
            assert sum(forwards) == captures and len(calls_of("_assisted_decoding").fell_through) == 1


def test_a_static_cache_of_the_callers_is_refused_in_transformers_words(npu: torch.device) -> None:
    model, ids = tiny("qwen3_next", max_position_embeddings=512).to(npu), prompt().to(npu)
    with applied(model, mtp=True):
        cache = StaticCache(config=model.config, max_cache_len=64)
        with pytest.raises(ValueError, match="not supported with Static cache"):
            model.generate(ids, max_new_tokens=8, past_key_values=cache, **LOOKUP, **GREEDY)
        assert list(calls_of("_assisted_decoding").fell_through) == [
            "drafts over a static cache that is the caller's, or was filled before"
        ]


def test_what_is_drawn_has_the_models_distribution(npu: torch.device, tmp_path: Path) -> None:
    model = loaded(saved("qwen3_5", tmp_path, vocab_size=5))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    expected = pairs(model) * DRAWS
    model, counts = model.to(npu), torch.zeros(5, 5, dtype=torch.double)
    ids = torch.tensor([[2, 3, 1, 4]], device=npu)
    given = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "cache_implementation": "static"}
    torch.manual_seed(11)
    with applied(model, mtp=True):
        for _ in range(DRAWS):
            drawn = model.generate(ids, max_new_tokens=3, use_mtp=True, num_assistant_tokens=2, **given)[0]
            counts[int(drawn[5]), int(drawn[6])] += 1
        assert calls_of("_assisted_decoding").ran
    assert p_value(counts, expected) > 1e-3


def test_restored_every_way_to_generate_is_what_it_was(npu: torch.device) -> None:
    model, ids = tiny("qwen3", max_position_embeddings=512).to(npu), prompt().to(npu)
    npu_patch.apply(model)
    plain = model.generate(ids, max_new_tokens=8, **LOOKUP, **STATIC)
    npu_patch.restore()
    assert torch.equal(model.generate(ids, max_new_tokens=8, **LOOKUP, **GREEDY), plain)
    with pytest.raises(ValueError, match="not supported with Static cache"):
        model.generate(ids, max_new_tokens=8, **LOOKUP, **STATIC)
