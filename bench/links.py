"""RTT and bandwidth of emulated links, configured and measured from outside (bench/link_outside.py)."""

from bench.link_outside import Measurement, measure, server
from bench.report import write
from splitlearn.arms.compare import environment
from splitlearn.arms.runs import Runs
from splitlearn.link.emulated import Link
from splitlearn.link.proxy import Proxy

CONFIGURED = tuple(Link(rtt, 0, rate, rate) for rtt in (5, 50, 200) for rate in (1, 10, 100))


def main(runs: Runs) -> None:
    """Measure and write docs/results/links.md."""
    with server() as target, Proxy() as proxy:
        rows = [_row(link, measure(proxy, target, link)) for link in CONFIGURED]
    text = (
        "Each link from outside, with plain sockets through the proxy to a plain server: the median RTT of one byte to "
        "and fro, and the bandwidth of two seconds of bytes each way."
    )
    write("links", "Emulated links, as asked for and as measured", text, rows, environment(runs))


def _row(link: Link, found: Measurement) -> dict[str, str]:
    rtt, up, down = found.rtt_s * 1e3, found.up_bits_per_s / 1e6, found.down_bits_per_s / 1e6
    return {
        "asked": link.summary,
        "RTT, ms": f"{rtt:.2f} ({rtt / link.rtt_ms - 1:+.1%})",
        "up, Mbit/s": f"{up:.2f} ({up / (link.up_mbit or up) - 1:+.1%})",
        "down, Mbit/s": f"{down:.2f} ({down / (link.down_mbit or down) - 1:+.1%})",
    }
