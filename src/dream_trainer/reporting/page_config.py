"""Configurations and checkpoints on a report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dream_trainer.configs.differing import ABSENT, differing
from dream_trainer.reporting.page_html import moment, table, told
from dream_trainer.reporting.run_view import RunView
from dream_trainer.storage.sizes import size


def config_section(views: Sequence[RunView]) -> str:
    """Configurations: differences of several, and each, to be searched and folded."""
    parts = [(view.label, view.report.config) for view in views]
    known = [(label, config) for label, config in parts if config is not None]
    if not known:
        return ""
    text = ""
    if len(known) > 1:
        found = differing([config for _, config in known])
        rows = [[f"<code>{escape(n)}</code>", *map(_value, v)] for n, v in found.items()]
        labels = [label for label, _ in known]
        text = (
            "<h3>Differences</h3>" + table(["Name", *map(escape, labels)], rows, kind="loose")
            if rows
            else "<p>The configurations are the same.</p>"
        )
    folded = "".join(
        f"<details{' open' if len(known) == 1 else ''}><summary>{escape(label)}</summary>"
        f'<div class="tree">{_tree(config)}</div></details>'
        for label, config in known
    )
    return (
        '<section id="config"><h2>Configuration</h2>'
        f'{text}<input id="search" type="search" placeholder="find an option" '
        f'aria-label="find an option">{folded}</section>\n'
    )


def _tree(config: Mapping[str, Any], prefix: str = "") -> str:
    leaves, groups = [], []
    for name, value in config.items():
        whole = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            inner = _tree(value, f"{whole}.")
            groups.append(f"<details open><summary>{escape(str(name))}</summary>{inner}</details>")
        else:
            found = escape(f"{whole} {told(value)}".lower(), quote=True)
            leaves.append(
                f'<div class="option" data-find="{found}"><code>{escape(str(name))}</code>'
                f"{_value(value)}</div>"
            )
    own = f'<div class="options">{"".join(leaves)}</div>' if leaves else ""
    return own + "".join(groups)


def checkpoint_section(views: Sequence[RunView]) -> str:
    """What there is to continue from."""
    many = len(views) > 1
    heads = [*(["Run"] if many else []), "Checkpoint", "Step", "Epoch", "Monitored", "Saved (UTC)"]
    heads += ["Size", "Why it stays", "State"]
    rows = []
    for view in views:
        for one in view.report.checkpoints:
            known = one.manifest
            monitored = known and known.monitored
            rows.append(
                [
                    *([escape(view.label)] if many else []),
                    f"<code>{escape(one.path.name)}</code>",
                    "" if one.step is None else f"{one.step:,}",
                    f"{known.epoch:,}" if known else "",
                    f"{monitored:.5g}" if isinstance(monitored, float) else "",
                    moment(known.saved_at) if known else "",
                    size(known.num_bytes) if known else "",
                    escape(", ".join(one.kinds)),
                    "whole" if one.is_whole else escape("; ".join(one.problems)),
                ]
            )
    if not rows:
        return ""
    numbers = {i: "number" for i, head in enumerate(heads) if head in _NUMBERS}
    text = table(heads, rows, numbers)
    return f'<section id="checkpoints"><h2>Checkpoints</h2>{text}</section>\n'


_NUMBERS = {"Step", "Epoch", "Monitored", "Size"}


def _value(value: Any) -> str:
    return (
        '<span class="quiet">not there</span>'
        if value is ABSENT
        else f"<span>{escape(told(value))}</span>"
    )
