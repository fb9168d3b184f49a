"""A simulated day as text, beside what DeepSeek published, and what a reader should not conclude."""

from collections.abc import Sequence

from experiments.planning.cluster.clock import Work
from experiments.planning.cluster.day import Lapse, spread
from experiments.planning.cluster.demand import PAGE
from experiments.planning.cluster.full import Anchor
from experiments.planning.cluster.setting import Setting
from experiments.planning.serving_times import Parts
from experiments.planning.tables import table

NOT = (
    "What not to conclude:",
    "- Tokens per second and node are fitted: steps of each phase are multiplied by one constant, so that these come out. The mean of",
    "  226.75 nodes follows from the published totals (608B / 86,400 s / 73.7k + 168B / 86,400 s / 14.8k = 226.9), and the most, 278,",
    "  from the day's curve, whose peak is assumed. They are no evidence. Evidence are the unfitted figures: a user's tokens per",
    "  second at this load, queues that stay short, SGLang's throughput with the same constants.",
    "- Assumed, not published: the day's curve, the spread of lengths, pauses between turns, that prefill is kept 85% busy. Constant",
    "  over 0.85 is what the day tells of prefill: were it busy 75% or 95%, SGLang's predicted prefill would be 13% more (and over 20% too high) or 11% less.",
    "- Prompts are divided among prefill devices as DeepSeek describes it. This engine's `choose_rank` does not even out attention",
    "  (--no-balanced): full steps take 49% longer than if devices were alike, not 25%; fitted so, SGLang's prefill would be 40% too high.",
    "- Steps are rooflines: experts are even (EPLB at its best), networks without congestion, hosts always in time.",
    "- DeepSeek published no time to the first token; it grows fast where prefill is fuller.",
    "- An hour is a window of seconds: what takes longer (caches that age, units that start) is not seen in it.",
)


def parts_of(lapse: Lapse, phase: str) -> dict[str, float]:
    """Name -> seconds of the mean step of a day, one part after the other."""
    samples = [s for w in lapse.windows for s in w.of(phase)]
    total = sum(s.took.work.amount * s.steps for s in samples)
    steps = sum(s.steps for s in samples)
    context = sum(s.took.work.amount * s.steps * s.took.work.context for s in samples) / total
    return _parts(lapse.setting, phase, Work(total / steps, context))


def _parts(setting: Setting, phase: str, work: Work) -> dict[str, float]:
    clock = setting.decode_clock if phase == "decode" else setting.prefill_clock
    found: Parts = clock.step(*work)
    return {name: part.seconds for name, part in found.parts.items()}


def heading(setting: Setting) -> str:
    day, s = setting.day, setting
    drafts = f", MTP drafts of which {s.acceptance:.0%} are accepted" if s.decode.drafts else ""
    latents = "FP8" if s.decode.fp8_latents else "BF16"
    return "\n".join(
        (
            f"{s.hardware.name}: prefill units of {s.prefill.devices} GPUs, decode units of {s.decode.devices}, latents in {latents}{drafts}; "
            f"{s.pages(s.decode) * PAGE:,} tokens of cache on a decode GPU",
            f"{day.requests:,.0f} requests/s: prompts of {day.prompt:,.0f} tokens, answers of {day.answer:,.0f}; {day.turn:.0%} go on with a "
            f"conversation, each brings {day.text:,.0f} new tokens",
            f"steps take {s.prefill_slow:.2f} (prefill) and {s.decode_slow:.2f} (decode) times what their roofline says",
        )
    )


def against(lapse: Lapse, anchors: Sequence[Anchor] = ()) -> str:
    """Beside the published figures."""
    rows = [
        ("input, tokens/s per node (fitted)", 73.7e3, lapse.input_rate(), ",.0f"),
        ("output, tokens/s per node (fitted)", 14.8e3, lapse.output_rate(), ",.0f"),
        ("nodes, mean of the day", 226.75, sum(lapse.nodes()), ".1f"),
        ("nodes, most", 278, lapse.peak(), ".0f"),
        ("share of input in the cache, %", 56.3, 100 * lapse.hits(), ".1f"),
        ("tokens in the cache per sequence", 4989, lapse.context(), ",.0f"),
        ("a user's tokens/s (published: 20 to 22)", 21, lapse.speed(), ".1f"),
        *((f"{a.name} (unfitted)", a.measured, a.predicted, ",.0f") for a in anchors),
    ]
    cells = [(name, [f"{a:{form}}", f"{b:{form}}", f"{b / a - 1:+.1%}"]) for name, a, b, form in rows]
    return table("", ["published", "simulated", "error"], cells)


def hours(lapse: Lapse) -> str:
    columns = [
        "prefill nodes",
        "decode nodes",
        "TTFT 50%",
        "90%",
        "99%",
        "tokens/s 50%",
        "slowest 1%",
        "sequences",
        "step, ms",
    ]
    rows = []
    for w in lapse.windows:
        decode = w.of("decode")
        steps = sum(s.steps for s in decode)
        speeds = sorted(j.speed for j in w.jobs if j.speed > 0)
        rows.append(
            (
                f"{w.hour:02}:00",
                [
                    *(str(n) for n in w.nodes),
                    *(f"{x:.2f}" for x in spread([j.wait for j in w.jobs])),
                    f"{spread(speeds)[0]:.1f}",
                    f"{speeds[len(speeds) // 100]:.1f}" if speeds else "-",
                    f"{sum(s.took.work.amount * s.steps for s in decode) / steps:.1f}",
                    f"{1e3 * sum(s.took.seconds * s.steps for s in decode) / steps:.1f}",
                ],
            )
        )
    return table("hour", columns, rows)


def price(lapse: Lapse, dollars: float) -> str:
    came, went, day = lapse.per_million(dollars)
    return (
        f"${day:,.0f} per day at ${dollars:g} per GPU-hour: ${came:.3f} per million tokens of input, ${went:.3f} of output, each by "
        "the nodes of its own phase"
    )


def waiting(lapse: Lapse, phase: str) -> float:
    """Share of the time of steps in which devices wait for the slowest."""
    samples = [s for w in lapse.windows for s in w.of(phase)]
    return sum(s.took.waiting * s.steps for s in samples) / sum(s.took.seconds * s.steps for s in samples)


def notes(lapse: Lapse) -> str:
    shape, jobs = lapse.shape, lapse.jobs
    return (
        f"simulated: {shape.prefill} prefill units of {shape.prefill_ranks} devices and {shape.decode} decode units of "
        f"{shape.decode_ranks}, each hour for {lapse.windows[0].seconds:g} s: {len(jobs):,} answers, "
        f"{sum(len(j.answer) for j in jobs):,} tokens; {lapse.preempted} sequences lost their pages\n"
        f"devices wait for the slowest of their unit for {waiting(lapse, 'prefill'):.0%} of a prefill step and "
        f"{waiting(lapse, 'decode'):.0%} of a decode step"
    )


def report(lapse: Lapse, anchors: Sequence[Anchor], dollars: float) -> str:
    blocks = (
        heading(lapse.setting),
        hours(lapse),
        against(lapse, anchors),
        price(lapse, dollars),
        notes(lapse),
        "\n".join(NOT),
    )
    return "\n\n".join(blocks)


def compared(lapses: Sequence[tuple[str, Lapse]], dollars: float) -> str:
    """A line for each what-if."""
    columns = [
        "nodes",
        "in/node",
        "out/node",
        "cached",
        "tokens/s",
        "TTFT 50%",
        "99%",
        "$/M in",
        "$/M out",
        "$/day",
    ]
    rows = []
    for name, x in lapses:
        came, went, day = x.per_million(dollars)
        rows.append(
            (
                name,
                [
                    *(
                        f"{sum(x.nodes()):.1f}",
                        f"{x.input_rate():,.0f}",
                        f"{x.output_rate():,.0f}",
                        f"{x.hits():.1%}",
                    ),
                    *(f"{x.speed():.1f}", f"{x.wait_of(0.5):.2f}", f"{x.wait_of(0.99):.2f}"),
                    *(f"{came:.3f}", f"{went:.3f}", f"{day:,.0f}"),
                ],
            )
        )
    return table("what if", columns, rows)
