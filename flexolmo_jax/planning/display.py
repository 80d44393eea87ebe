"""A plan, as tables and lines for the terminal."""

from rich.table import Table
from rich.text import Text

from flexolmo_jax.chips import GPU_MEMORY_FRACTION
from flexolmo_jax.planning.plan import Plan
from flexolmo_jax.tables import MISSING, plain_table, scaled

GPU_MEMORY = (
    f"Available: what JAX takes of a GPU with XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_MEMORY_FRACTION}; without it, 0.75. "
    "Close to it, XLA recomputes more than is counted here."
)


def heading(plan: Plan) -> str:
    """A line that says what was planned for what."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    return (
        f"{plan.parameters:,} parameters on {plan.topology}: {plan.devices} device{'s' * (plan.devices > 1)} "
        f"({plan.chip.device_kind}), mesh {mesh}; {plan.tokens:,} tokens a step; "
        f"compiled in {plan.compile_seconds:.0f} s"
    )


def memory_table(plan: Plan) -> Table:
    """What a device holds."""
    memory = plan.memory
    table = plain_table("memory of a device", ["size", "share"])
    sizes = {
        "parameters, trained": memory.trained,
        "parameters, frozen": memory.frozen,
        "optimizer state": memory.optimizer,
        "batch": memory.batch,
        "activations, gradients, other temporaries": memory.temporaries,
        "peak": memory.peak,
        "available": memory.available,
    }
    for name, size in sizes.items():
        table.add_row(name, scaled(size, "B", 1024), f"{size / memory.available:.1%}")
    return table


def collectives_table(plan: Plan) -> Table:
    """What a device sends in a step, by kind of collective and the mesh axes it goes along."""
    table = plain_table("collective", ["along", "runs", "sent", "time"])
    for total in plan.collectives or ():
        cells = (f"{total.runs:,}", scaled(total.bytes_sent, "B"), scaled(total.seconds, "s"))
        table.add_row(total.kind, Text(" x ".join(total.axes) or MISSING), *cells)
    return table


def roofline_table(plan: Plan) -> Table:
    """What a device does in a step, and how long it takes."""
    line, chip = plan.roofline, plan.chip
    table = plain_table("a step, on each device", ["amount", "rate", "time"])
    flops = line.flops + line.recomputed_flops
    share = f", {line.recomputed_flops / flops:.0%} recomputed" if line.recomputed_flops else ""
    amount, rate = scaled(flops, "FLOP") + share, scaled(chip.peak_flops, "FLOP/s")
    table.add_row("arithmetic", amount, rate, scaled(line.limits["arithmetic"], "s"))
    estimates = {"at best": line.at_best}
    if line.hbm_bytes is not None and line.sent_bytes is not None:  # else what the program moves is not known
        hbm, link = scaled(chip.hbm_bandwidth, "B/s"), scaled(chip.link_bandwidth, "B/s") + " a link"
        table.add_row("HBM", scaled(line.hbm_bytes, "B"), hbm, scaled(line.limits["HBM"], "s"))
        table.add_row("interconnect", scaled(line.sent_bytes, "B"), link, scaled(line.limits["interconnect"], "s"))
        estimates["at worst"] = line.at_worst
    for name, seconds in estimates.items():
        share = f"{line.flops / seconds / chip.peak_flops:.0%} MFU"
        table.add_row(name, f"{plan.tokens / seconds:,.0f} tokens/s", share, scaled(seconds, "s"))
    return table


def run_line(plan: Plan) -> str:
    """How long the whole run takes, and what it costs in chip-hours."""
    chips = plan.devices // plan.chip.devices_per_chip
    hours = [plan.steps * seconds / 3600 for seconds in (plan.roofline.at_best, plan.roofline.at_worst)]
    least, most = (f"{h:,.0f} h" if h >= 10 else f"{h:.2f} h" if h >= 1 else scaled(3600 * h, "s") for h in hours)
    cost = " to ".join(f"{h * chips:,.0f}" if h * chips >= 10 else f"{h * chips:.3g}" for h in hours)
    return f"{plan.steps:,} steps take {least} to {most}: {cost} {'GPU' if plan.chip.is_gpu else 'chip'}-hours"
