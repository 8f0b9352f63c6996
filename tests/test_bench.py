"""The benchmark itself is run by hand. Here its rows are printed for a narrow model of the same depth."""

from by_hand import bench


def test_every_row_is_printed(tmp_path, monkeypatch, capsys):
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
