"""The benchmark is run by hand; here its rows on a model of the same depth that is small otherwise."""

from by_hand import bench


def test_every_row_about_the_model_can_be_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(bench.CONFIG, "text_config", {**bench.CONFIG["text_config"], "hidden_size": 48,
                                                      "intermediate_size": 64, "head_dim": 16})
    monkeypatch.setitem(bench.CONFIG, "vision_config", {**bench.CONFIG["vision_config"], "hidden_size": 24,
                                                        "intermediate_size": 32, "image_size": 128})
    monkeypatch.setattr(bench, "NEW", 3)
    monkeypatch.setattr(bench, "LONG", (9, 160))
    monkeypatch.setattr(bench, "HAS_TRANSFORMERS", False)
    bench.write_checkpoint(tmp_path)
    bench.model_rows(tmp_path, repeats=1)
    assert bench.peak_memory(tmp_path) >= 0
    rows = [line[:34].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows == ["vision encoder, 8 frames", "prefill, 234 tokens", "decoding, 3 tokens", "OutRo, prefill",
                    "OutRo, decoding", "OutRo, whole answer", "prefill, 9 frames, 196 tokens",
                    "OutRo, prefill, 9 frames"]


def test_two_ways_are_timed_in_turn():
    """One call each that is not counted, then so many of each."""
    calls = []
    results = bench.in_turn(2, {"a": lambda: calls.append("a"), "b": bench.timed(lambda: calls.append("b"))})
    assert calls == ["a", "b"] * 3 and results["a"] == [None, None]
    assert len(results["b"]) == 2 and min(results["b"]) > 0
    assert bench.spread([2.0, 1.0, 4.0]) == "2.000 (1.000-4.000)"
