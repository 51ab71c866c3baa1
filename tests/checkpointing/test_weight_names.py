"""Which names of a file stand for which weights of a trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dream_trainer.checkpointing.weight_names import match
from dream_trainer.errors import ConfigError

T = torch.zeros(1)
OWN = ("net.encoder.w", "net.head.w")
PLAIN = {"encoder.w": T, "head.w": T}
OPTIMIZER = {"state": {0: {"exp_avg": T}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
RUN: dict[str, Any] = {
    "trainer": {"gradients": {"net.head.w": T}, "buffers": {"net": {"head.w": T}}},
    "models": {"net": PLAIN},
    "optimizers": {"net": {"state": {"net.head.w": {"exp_avg": T}}, "param_groups": []}},
    "schedulers": {"net": {"base": T}},
    "callbacks": {"ema": PLAIN},
}


def matched(tree: Any, rename: Any = None, own: Any = OWN, models: Any = ("net",)) -> Any:
    return match(tree, own, models, rename or {}, "file.pt")


def places(tree: Any, **options: Any) -> dict[str, str]:
    found = matched(tree, **options)
    assert found.problems == []
    return {name: "/".join(map(str, place)) for name, place in found.places.items()}


@pytest.mark.parametrize(
    ("tree", "folder"),
    [
        (PLAIN, ""),
        ({"net.encoder.w": T, "net.head.w": T}, "net."),
        ({"net": PLAIN}, "net/"),
        ({"model": PLAIN, "optimizer": OPTIMIZER, "epoch": 3, "best": 0.5}, "model/"),
        ({"net": PLAIN, "optimizer": OPTIMIZER, "rng": T}, "net/"),
        ({"generator": PLAIN}, "generator/"),
        ({"a": {"b": [PLAIN]}}, "a/b/0/"),
        ({"_forward_module.encoder.w": T, "_forward_module.head.w": T}, "_forward_module."),
        ({"module.encoder.w": T, "module.head.w": T}, "module."),
        ({"module": PLAIN, "optimizer": OPTIMIZER}, "module/"),
        ({"_orig_mod.module.encoder.w": T, "_orig_mod.module.head.w": T}, "_orig_mod.module."),
        (RUN, "models/net/"),
        ({"trainer": RUN, "more": 1}, "trainer/models/net/"),
        (
            {"state_dict": PLAIN, "optimizer_states": [OPTIMIZER], "callbacks": {"best": {"s": T}}},
            "state_dict/",
        ),
        ({"state_dict": {"net.encoder.w": T, "net.head.w": T}}, "state_dict/net."),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.rstrip("./") or "plain",
)
def test_a_weight_is_found_wherever_a_file_has_it(tree: Any, folder: str) -> None:
    assert places(tree) == {"net.encoder.w": folder + "encoder.w", "net.head.w": folder + "head.w"}


def test_a_nested_state_dict_is_one_too() -> None:
    assert places({"encoder": {"w": T}, "head": {"w": T}}) == {
        "net.encoder.w": "encoder/w",
        "net.head.w": "head/w",
    }


def test_several_models_are_told_apart_by_name() -> None:
    own, models = ("gen.w", "disc.w"), ("gen", "disc")
    expected = {"gen.w": "gen/w", "disc.w": "disc/w"}
    assert places({"gen": {"w": T}, "disc": {"w": T}}, own=own, models=models) == expected
    nested = {"weights": {"gen": {"w": T}, "disc": {"w": T}}}
    assert places(nested, own=own, models=models).keys() == expected.keys()
    assert matched({"w": T}, own=own, models=models).problems == ["w: in the file, not in a model"]


def test_a_part_that_is_named_module_stays_where_the_models_have_one() -> None:
    assert places({"module.w": T}, own=("net.module.w",)) == {"net.module.w": "module.w"}


def test_a_model_with_a_part_of_its_own_name_is_not_mixed_up_with_it() -> None:
    own = ("net.net.w", "net.w")
    for tree in ({"net.w": T, "w": T}, {"net.net.w": T, "net.w": T}, {"a": {"net.w": T, "w": T}}):
        found = places(tree, own=own)
        assert len(found["net.net.w"]) > len(found["net.w"])


def test_two_state_dicts_are_not_guessed_between() -> None:
    tree = {"model": PLAIN, "ema": PLAIN}
    assert len(matched(tree).problems) == 4
    assert places(tree, rename={"ema": None})["net.head.w"] == "model/head.w"
    assert places(tree, rename={"model": None, "ema": "net"})["net.head.w"] == "ema/head.w"


@pytest.mark.parametrize(
    ("tree", "rename"),
    [
        ({"backbone.w": T, "fc.w": T}, {"backbone": "encoder", "fc": "head"}),
        ({"backbone.w": T, "fc.w": T}, {"backbone": "net.encoder", "fc": "net.head"}),
        ({"model": {"backbone.w": T, "head.w": T}}, {"backbone": "encoder"}),
        ({"model": {"backbone.w": T, "head.w": T}}, {"model.backbone": "encoder"}),
        ({"model.encoder.w": T, "model.head.w": T}, {"model": "net"}),
        ({"model.encoder.w": T, "model.head.w": T}, {"model": ""}),
        ({"module.backbone.w": T, "module.head.w": T}, {"module.backbone": "encoder"}),
        ({"module.encoder.w": T, "module.head.w": T}, {"module": "net"}),
        ({"a.w": T, "a.b.w": T}, {"a": "encoder", "a.b": "head"}),
        ({"a.b.w": T, "a.w": T}, {"a.b": "head", "a": "encoder"}),
        ({"enc.w": T, "encoder2.w": T}, {"enc": "encoder", "encoder2": "head"}),
        ({"encoder.weight": T, "head.w": T}, {"encoder.weight": "encoder.w"}),
    ],
)
def test_prefixes_are_replaced_in_whole_parts_the_longest_first(tree: Any, rename: Any) -> None:
    assert places(tree, rename=rename).keys() == set(OWN)


def test_the_empty_prefix_puts_everything_below_a_name() -> None:
    own = ("net.encoder.w", "net.encoder.b")
    assert places({"w": T, "b": T}, rename={"": "encoder"}, own=own).keys() == set(own)
    assert places({"model": {"w": T, "b": T}}, rename={"": "encoder"}, own=own).keys() == set(own)


def test_a_part_that_is_mapped_to_nothing_is_left_out() -> None:
    assert places(PLAIN, rename={"head": None}) == {"net.encoder.w": "encoder.w"}
    tree = {"old.w": T, "old.kept.w": T, "encoder.w": T}
    assert places(tree, rename={"old": None, "old.kept": "head"}).keys() == set(OWN)


def test_what_has_no_place_is_named_with_what_it_was_renamed_to() -> None:
    tree = {"backbone.w": T, "head.w": T, "fc.w": T}
    assert matched(tree, rename={"fc": "head"}).problems == [
        "backbone.w: in the file, not in a model",
        "fc.w (as head.w): stands for net.head.w, and so does head.w",
    ]
    assert matched(tree, rename={"backbone": "enc", "fc": None}).problems == [
        "backbone.w (as enc.w): in the file, not in a model"
    ]


def test_an_entry_that_matches_nothing_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ConfigError) as caught:
        matched({"model": PLAIN}, rename={"encodr": "x", "w": None, "head": None})
    assert caught.value.problems == (
        "'encodr' begins no name in file.pt",
        "'w' begins no name in file.pt",
    )
    assert caught.value.next_move == "The names there: model.encoder.w, model.head.w."
    with pytest.raises(ConfigError, match="did you mean 'backbone'"):
        matched({"backbone.w": T}, rename={"bakbone": ""})
    many = {f"layer{n}.w": T for n in range(100)}
    with pytest.raises(ConfigError, match=r"layer39\.w and 60 more\.$"):
        matched(many, rename={"none": ""})


def test_a_random_state_beside_state_dicts_is_no_weight() -> None:
    assert places({"model": PLAIN, "rng": T, "step": T}).keys() == set(OWN)
