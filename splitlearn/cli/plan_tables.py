"""What `splitlearn plan` prints to read."""

from splitlearn.cli.tables import in_bytes
from splitlearn.planning.choice import Choice, config_lines, path, sentence
from splitlearn.planning.route import Route
from splitlearn.runtime.console import PlainTable, console
from splitlearn.runtime.terminal import say


def print_choice(choice: Choice) -> None:
    """The verdict, the best route with its time breakdown and memory, and the lines to paste."""
    console().print(_figures(choice))
    console().print(_links(choice))
    say(sentence(choice))
    best = choice.best
    if best is None:
        return
    say()
    say(path(choice, best))
    tokens = f"{best.tokens_per_s:.1f} tokens a second of many sessions ({best.slowest} is the slowest)"
    say(f"TPOT {best.tpot_s * 1e3:.1f} ms, TTFT {best.ttft_s * 1e3:.0f} ms, {tokens}")
    console().print(_breakdown(best))
    console().print(_memory(best))
    if lines := config_lines(choice, best):
        say("config.yaml:")
        say(lines)


def _figures(choice: Choice) -> PlainTable:
    table = PlainTable("device", "a layer, decode", "prefill", "a step beside", "the first one", "base", "weight ratio")
    for device in choice.network.devices:
        seconds = (device.layer_s, device.prefill_s, device.step_s, device.start_s)
        times = (f"{each * 1e3:.3g} ms" for each in seconds)
        table.add_row(device.name, *times, in_bytes(device.base_bytes), f"{device.weight_ratio:.3g}")
    return table


def _links(choice: Choice) -> PlainTable:
    table = PlainTable("link", "round trip and bandwidth")
    for pair, link in sorted(choice.network.links.items()):
        table.add_row(" - ".join(choice.network.devices[each].name for each in pair), link.summary)
    return table


def _breakdown(route: Route) -> PlainTable:
    table = PlainTable("predicted", "layers", "of a token", "of the first token")
    for share in route.breakdown:
        if share.token_s or share.first_s:
            table.add_row(
                share.where, share.layers, *(f"{each * 1e3:.2f} ms" for each in (share.token_s, share.first_s))
            )
    return table


def _memory(route: Route) -> PlainTable:
    table = PlainTable("memory", "layers", "needs", "has")
    for use in route.uses:
        table.add_row(use.device, use.layers, in_bytes(use.needed_bytes), in_bytes(use.memory_bytes))
    return table
