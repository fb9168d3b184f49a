"""The Prometheus text format, by an example written by hand."""

from deepseek_jax.serving.server.metrics import Counter, Histogram, Info, Read, text


def test_the_text_format():
    ends = Counter("x:ends_total", "Ends.", ("reason",))
    ends.add(2, "stop")
    ends.add(1, 'a "b"\\\n')
    plain = Counter("x:plain_total", "Plain.")
    seconds = Histogram("x:seconds", "How long.", (0.1, 2.5))
    for value, times in ((0.1, 1), (0.5, 3), (7.0, 1)):
        seconds.observe(value, times)
    assert text((("m", "tiny"),), (ends, plain, Read("x:now", "Now.", lambda: 0.5), seconds)) == (
        "# HELP x:ends_total Ends.\n"
        "# TYPE x:ends_total counter\n"
        'x:ends_total{m="tiny",reason="a \\"b\\"\\\\\\n"} 1\n'
        'x:ends_total{m="tiny",reason="stop"} 2\n'
        "# HELP x:plain_total Plain.\n"
        "# TYPE x:plain_total counter\n"
        'x:plain_total{m="tiny"} 0\n'
        "# HELP x:now Now.\n"
        "# TYPE x:now gauge\n"
        'x:now{m="tiny"} 0.5\n'
        "# HELP x:seconds How long.\n"
        "# TYPE x:seconds histogram\n"
        'x:seconds_bucket{m="tiny",le="0.1"} 1\n'
        'x:seconds_bucket{m="tiny",le="2.5"} 4\n'
        'x:seconds_bucket{m="tiny",le="+Inf"} 5\n'
        'x:seconds_sum{m="tiny"} 8.6\n'
        'x:seconds_count{m="tiny"} 5\n'
    )
    assert text((), [Info("x:info", "Facts.", lambda: (("a", "1"),))]).endswith('\nx:info{a="1"} 1\n')
