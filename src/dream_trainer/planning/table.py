"""A plan for people: a few tables without lines, 80 columns wide where names allow it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from dream_trainer.callbacks import screen
from dream_trainer.planning.epochs import LoaderPlan
from dream_trainer.planning.holdings import whole_bytes
from dream_trainer.planning.run_plan import RunPlan
from dream_trainer.storage.sizes import size

_NOT_COUNTED = (
    "Activations, buffers of collectives and what the allocator keeps are not counted. Shards are "
    "padded to the size of the largest in memory."
)


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print a plan."""
    for part in _parts(plan):
        console.print(part)


def as_text(plan: RunPlan, width: int = 80) -> str:
    """A plan in plain text, in lines of so many columns where names allow it."""
    return screen.as_text(*_parts(plan), width=width)


def _parts(plan: RunPlan) -> Iterator[RenderableType]:
    layout = plan.layout
    nodes = f"{layout.num_nodes} node{'s' * (layout.num_nodes != 1)} of {layout.ranks_per_node}"
    sizes = " x ".join(f"{name} {one}" for name, one in layout.sizes.items() if one > 1)
    head = f"{layout.num_ranks:,} rank{'s' * (layout.num_ranks != 1)} on {nodes}"
    yield Text(f"{head}: {sizes or 'a single device'}, {plan.precision}\n", style="bold")
    if layout.groups:
        yield _groups(plan)
    yield _models(plan)
    yield _memory(plan)
    yield _data(plan)
    for note in plan.notes:
        yield Text(f"Note: {note}.")
    yield Text(_NOT_COUNTED, style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _groups(plan: RunPlan) -> Table:
    table = _table("Groups", "Ranks", "Groups", "Nodes in a group", "The first group")
    for group in plan.layout.groups:
        table.add_row(
            group.dimension, f"{group.size:,}", f"{group.count:,}", f"{group.nodes:,}", group.first
        )
    return _spaced(table)


def _models(plan: RunPlan) -> Table:
    table = _table("Models", "Trainable", "Frozen", "Bytes", "Gathered at once")
    for model in plan.memory.models:
        part, number = model.gathered or ("", None)
        place = f"{size(number)} ({part or 'the model'})" if model.gathered else "-"
        table.add_row(
            f"{model.name} ({model.type})",
            f"{model.trainable:,}",
            f"{model.frozen:,}",
            size(whole_bytes(model.parameters)),
            place,
        )
    return _spaced(table)


def _memory(plan: RunPlan) -> Table:
    ranks = plan.extremes
    most, *least = ranks
    names = [f"rank {most}, most", *(f"rank {r}, least" for r in least)] if least else ["each rank"]
    held = [plan.bytes_on(rank) for rank in ranks]
    kinds = ", ".join(dict.fromkeys(one.type for one in plan.memory.optimizers))
    table = _table("Memory", *names)
    rows = {
        "parameters": "parameters",
        "gradients": "gradients",
        "optimizer_state": f"optimizer state ({kinds or 'no optimizer'})",
        "buffers": "buffers",
    }
    if plan.memory.averages:
        rows["averages"] = "averages of weights"
    for key, words in rows.items():
        table.add_row(words, *(size(one[key]) for one in held))
    totals = [_sum([one[key] for key in rows]) for one in held]
    table.add_row("in all", *map(size, totals), style="bold")
    for key, words in (
        ("gathered", "and for a while: the largest part, gathered"),
        ("window_gradients", "and between batches of a step: gradients, whole"),
    ):
        if any(one[key] for one in held):
            table.add_row(words, *(size(one[key]) for one in held))
    table.add_row("written for a checkpoint, at most", *(size(one["checkpoint"]) for one in held))
    table.add_row("a checkpoint, in all", size(plan.checkpoint_bytes))
    return _spaced(table)


def _data(plan: RunPlan) -> Table:
    steps, loaders = plan.steps, [plan.train] + ([plan.val] if plan.val else [])
    table = _table("Data", "train", *["val"] * (len(loaders) - 1))

    def row(words: str, *values: int | None) -> None:
        table.add_row(words, *("unknown" if one is None else f"{one:,}" for one in values))

    def of(name: str) -> list[int | None]:
        return [getattr(one, name) if isinstance(one, LoaderPlan) else None for one in loaders]

    row("samples of an epoch", *of("samples"))
    if of("samples_used") != of("samples"):
        row("  of them used", *of("samples_used"))
    row("data-parallel ranks", *[plan.layout.dp_size] * len(loaders))
    row("samples per batch on a rank", *of("batch_size"))
    row("batches of an epoch on each rank", *of("batches"))
    if steps.val_batches is not None:
        table.add_row("  of them in one validation", "", f"{steps.val_batches:,}")
    row("samples of the last batch, all ranks", *of("last_batch_samples"))
    if any(of("idle_ranks")):
        row("  ranks without a sample in it", *of("idle_ranks"))
    row("batches per step", steps.accumulation)
    row("samples per step, all ranks", steps.samples_per_step)
    row("steps of an epoch", steps.per_epoch)
    if steps.last_window is not None:
        row("  batches of the last one", steps.last_window)
    row("steps of the run", steps.total)
    return _spaced(table)


def _sum(numbers: list[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _spaced(table: Table) -> Table:
    table.add_row("")
    return table
