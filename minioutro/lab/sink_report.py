"""Four tables about the sink of any checkpoint.

    python -m minioutro.lab.sink_report                                    of the toy and its clip
    python -m minioutro.lab.sink_report VIDEO "QUESTION" --model FOLDER    of any SmolVLM2 checkpoint
"""

import argparse
import json
import sys
from dataclasses import replace

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from minioutro import Cache, OutRo, VideoLM, load, read_video
from minioutro.lab.analysis import (
    QUESTION,
    Examples,
    attention_mass,
    detectors,
    logits_of,
    nop_or_broadcast,
    overlap,
    sink_dimensions,
    sink_share,
    token_losses,
    without_row,
)
from minioutro.model import (
    attention,
    causal_mask,
    merge_heads,
    repeat_heads,
    rope_tables,
    rotate,
    split_heads,
)
from minioutro.support.cli import add_options, one_line_errors
from minioutro.weights import HUB_MODEL, TOY

UNSCORED = 16               # tokens at the head of a text, which are guessed from next to nothing
MARK = OutRo(relax=False, align=False)              # marks the sinks and changes nothing


def weights_by_head(model: VideoLM, trace: dict, cache: Cache, l: int):
    """Yield the attention weights of each head of layer l, float[B,1,S,S], from the layer's input
    and the cached keys. All of a layer would be gigabytes for a long prompt."""
    layer, hidden, c = model.model.text_model.layers[l], trace[f"layers.{l}.hidden"], model.config
    S, H, device = hidden.shape[1], layer.n_heads, hidden.device
    cos, sin = rope_tables(torch.arange(S, device=device)[None, None], c.text_config.head_dim,
                           c.text_config.rope_theta, like=hidden)
    q = rotate(split_heads(layer.self_attn.q_proj(layer.input_layernorm(hidden)), H), cos, sin)
    k, v = repeat_heads(cache.keys(l), H), repeat_heads(cache.values(l), H)
    for head in zip(*(x.split(1, dim=1) for x in (q, k, v))):                   # (B,1,S,D) each
        yield attention(*head, causal_mask(S, S, device))[1]


def sources(model: VideoLM, trace: dict, positions: list[int]) -> Tensor:
    """What the embedding, then the MLP of each layer but the last gives to these tokens of item 0:
    float[L,N,C]."""
    given = [trace["layers.0.hidden"][0, positions]]
    for l, layer in enumerate(model.model.text_model.layers[:-1]):
        out = merge_heads(trace[f"layers.{l}.out"])[0, positions]                       # (N,H*D)
        attended = trace[f"layers.{l}.hidden"][0, positions] + layer.self_attn.o_proj(out)
        given.append(trace[f"layers.{l + 1}.hidden"][0, positions] - attended)
    return torch.stack(given)


def without_token(asked: Examples, position: int, image_token_id: int) -> Examples:
    """The same, with one token of the prompts left out; all later ones move up."""
    keep = torch.arange(asked.input_ids.shape[1], device=asked.input_ids.device) != position
    features = asked.features
    if features is not None:
        features = features[:, keep[asked.input_ids[0] == image_token_id]]
    return replace(asked, input_ids=asked.input_ids[:, keep], features=features)


def describe(model: VideoLM, trace: dict, cache: Cache, sink: int, dimensions: Tensor) -> dict:
    """The first two tables of `analyse`, a row for each layer."""
    def spread(x: Tensor) -> list[float]:
        return [x.min().item(), x.median().item(), x.max().item()]

    C, L, who, holds = model.config.text_config.hidden_size, len(cache.k), [], []
    adds = [*sources(model, trace, [sink])[1:, 0, dimensions[0]].tolist(), None]
    for l in range(L):
        hidden, ratio = trace[f"layers.{l}.hidden"].float(), trace[f"layers.{l}.ratio"][0]
        heads = [(attention_mass(weights), weights[:, :, :, sink].clone())      # else all are kept
                 for weights in weights_by_head(model, trace, cache, l)]
        mass, to_sink = (torch.cat(x, dim=1).float() for x in zip(*heads))      # (1,H,S) both
        by = detectors(hidden, mass, dimensions)
        by["dimension"] = by["phi > 20" if C > 400 else "dimensions"]
        by = {name: by[name] for name in ("activation", "attention", "dimension")}
        marked = {name: is_sink[0].nonzero().flatten().tolist() for name, is_sink in by.items()}
        who.append({"layer": l, **marked,
                    "overlap": overlap(*by.values()), "heads": sink_share(mass)[0, sink].item(),
                    "ratio": ratio.max().item(), "of": ratio.argmax().item(), "MLP adds": adds[l]})
        k, v, out = (x.float() for x in (cache.keys(l), cache.values(l), trace[f"layers.{l}.out"]))
        k, v_sink = k.norm(dim=-1), v[:, :, sink]                               # (1,G,S), (1,G,D)
        size, along = nop_or_broadcast(out, v, v_sink)
        term = to_sink * repeat_heads(v_sink.norm(dim=-1), out.shape[1])[:, :, None]
        term = (term / out.norm(dim=-1))[:, :, sink:].median(-1).values         # (1,H)
        holds.append({"layer": l, "|k|": spread(k[:, :, sink] / k.median(-1).values),
                      "|v|": spread(size), "variance": spread(along), "term": spread(term),
                      "attention": spread(mass[:, :, sink])})
    return {"who": who, "holds": holds}


@torch.inference_mode()
def analyse(model: VideoLM, input_ids: Tensor, features: Tensor | None = None) -> dict:
    """The four tables of `python -m minioutro.lab.sink_report` about one prompt, or about a text.

    input_ids: int64[1,S]; features: float[1,F*M,C] of `encode`. With features, losses are those of
    the model's own greedy answer; without, of the text itself behind its first tokens and its sink.
    The sink is the token with the largest ratio among those that the rule marks, else among all.
    Compared with it are the ordinary tokens a quarter, a half and three quarters of the way to what
    is scored. Changes of the loss have their standard error over the tokens that are scored.
    Raises: ValueError for a text that is too short.
    """
    if features is not None:
        answer = model.generate(input_ids, features=features)
        answer_ids = torch.tensor([answer], device=input_ids.device)
    elif input_ids.shape[1] < UNSCORED + 2:
        raise ValueError(f"a text of {input_ids.shape[1]} tokens is too short; give a longer one")
    else:
        answer, input_ids, answer_ids = [], input_ids[:, :-1], input_ids[:, -1:]
    S, L, (trace, cache) = input_ids.shape[1], len(model.model.text_model.layers), ({}, Cache())
    model.hidden_states(input_ids, features=features, outro=MARK, cache=cache, trace=trace)
    ratio, is_sink = (torch.cat([trace[f"layers.{l}.{name}"] for l in range(L)])
                      for name in ("ratio", "is_sink"))                         # (L,S) both
    marked, ratio = is_sink.any().item(), ratio.nan_to_num()
    searched = ratio.masked_fill(~is_sink, 0) if marked else ratio[:max(1, L - MARK.skip_last)]
    at, sink = divmod(searched.argmax().item(), S)
    start = S if features is not None else max(UNSCORED, sink + 1)
    ordinary = [i for i in range(start) if i != sink and not is_sink[:, i].any()]
    tokens = [sink, *(ordinary[len(ordinary) * i // 4] for i in (1, 2, 3))]

    # Who writes the largest coordinate of each? The others' shall not be the sink's.
    hidden = trace[f"layers.{at}.hidden"][:, tokens]                            # (1,N,C)
    dimensions, magnitude = sink_dimensions(hidden[:, :1]), hidden[0].abs()
    found = {"marked": marked, "position": sink, "layer": at, "ratio": ratio[at, sink].item(),
             "activation": magnitude.amax(-1)[0].item(), "coordinate": dimensions[0].item()}
    magnitude[1:, dimensions[0]] = 0
    rows, given = magnitude.argmax(-1).tolist(), sources(model, trace, tokens)[:at + 1].abs()
    writers = [given[:, n, d].argmax().item() - 1 for n, d in enumerate(rows)]  # -1: the embedding
    found |= {"written by": writers[0], **describe(model, trace, cache, sink, dimensions)}
    del trace, cache                                                # gigabytes of a long prompt

    T = S + answer_ids.shape[1]
    scored = torch.ones(1, T - start, dtype=torch.bool, device=input_ids.device)
    asked = Examples(input_ids, features, answer_ids, scored)
    plain = logits_of(model, asked)                                             # (1,n,V)
    losses = token_losses(plain, asked)[0]                                      # (n,)

    def change(logits: Tensor) -> tuple[float, float]:
        difference = token_losses(logits, asked)[0] - losses
        error = difference.std(correction=0) / max(1, len(losses) - 1)**0.5
        return difference.mean().item(), error.item()

    cuts = {}
    for position, d, writer in tqdm([*zip(tokens, rows, writers)], desc="cuts", disable=None):
        mask, after = causal_mask(T, T, input_ids.device), Cache()
        mask[position + 1:, position] = False
        cut = {"column masked": change(logits_of(model, asked, masks=[mask] * L))}
        shorter = without_token(asked, position, model.config.image_token_id)
        cut["left out"] = change(logits_of(model, shorter, MARK, cache=after))
        marked_then = after.sinks.ever_sink[0].nonzero().flatten().tolist()
        cut["marked then"] = [i + (i >= position) for i in marked_then]
        cut["writing row silenced"] = None if writer < 0 else change(
            logits_of(without_row(model, writer, d), asked))
        for n in (1, 2, 8):
            zeroed = logits_of(model, asked, zero_keys=(range(L), position, n))
            cut[f"Zero-K, {n} of each key"] = change(zeroed)
        cuts[f"token {position}"] = cut
    without = [{"": way, **{token: cut[way] for token, cut in cuts.items()}} for way in cut]

    rule = MARK if marked else replace(MARK, abs_threshold=0.999 * found["activation"],
                                       median_multiple=0.999 * found["ratio"])
    outros, ways = [], [("relax", 0), *((w, g) for w in ("align", "both") for g in (0.5, 1, 3))]
    for way, gamma in tqdm(ways, desc="OutRo", disable=None):
        outro = replace(rule, relax=way != "align", align=way != "relax", gamma=gamma)
        logits = logits_of(model, asked, outro)
        p = (logits.argmax(-1) != plain.argmax(-1)).float().mean().item()
        outros.append({"": way, "gamma": gamma or None, "change": change(logits),
                       "largest move": (logits - plain).abs().max().item(),
                       "argmaxes": [p, (p * (1 - p) / len(losses))**0.5]})
    return {**found, "others": tokens[1:], "answer_ids": answer, "tokens": len(losses),
            "loss": losses.mean().item(), "without": without, "outro": outros,
            "width": model.config.text_config.hidden_size}


def table(rows: list[dict]) -> str:
    """Aligned columns, named by the keys: changes with their error, lists by their first three."""
    def cell(value) -> str:
        if isinstance(value, tuple):
            return "{:+.4f} ± {:.4f}".format(*value)
        if isinstance(value, list):
            more = f" +{len(value) - 3}" if len(value) > 3 else ""
            return " ".join(map(cell, value[:3])) + more or "-"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
        return "-" if value is None else str(value)

    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
                     for first, *rest in lines)


def report(found: dict, texts: list[str], scored: str) -> str:
    """What `analyse` found, as text. texts: of each token; scored: what the losses are of."""
    sink, *others = (f"token {i} {texts[i]!r}" for i in (found["position"], *found["others"]))
    sink = f"The sink is {sink}" if found["marked"] else (
        f"The rule marks no token. The nearest, called the sink below, is {sink}")
    layer = found["written by"]
    writer = "the embedding" if layer < 0 else f"the MLP of layer {layer}"
    limit = "20" if found["width"] > 400 else (
        f"{20 / 64 * found['width']**0.5:.1f}: 20 cannot be reached below a width of 400")
    return f"""\
{sink}: {found['ratio']:,.0f} times the median in layer {found['layer']},
|h| {found['activation']:,.0f} in coordinate {found['coordinate']}, written by {writer}.

1. Who is a sink: positions that are marked by activation (OutRo's rule), by the attention of half
of the heads, and by dimension (phi > {limit}); their overlap; the share
of the heads that give the sink over 0.3; the largest ratio, of which position; what the MLP adds to
the sink's coordinate.
{table(found['who'])}

2. What it holds, least, median and most over the heads: |k| and |v| by the median token's, share of
the outputs' variance along its v, length of its term by the output's, attention to it.
{table(found['holds'])}

3. What happens without it, and without {', '.join(others)}:
change of the loss, {found['loss']:.4f} nats a token, over {found['tokens']} tokens of {scored}.
{table(found['without'])}

4. What OutRo does{'' if found['marked'] else ', its thresholds lowered to this token'}: change of \
the loss, largest move of a logit, argmaxes changed (share and error).
{table(found['outro'])}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minioutro.lab.sink_report", usage=argparse.SUPPRESS,       # an error is one line
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", nargs="?", help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default=QUESTION, help="default: %(default)s")
    add_options(parser, of_outro=False)
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")   # not every terminal can show all
    with one_line_errors("sink_report.py"), torch.inference_mode():
        if "" in (args.video, args.model):
            raise ValueError("the name of video or model is empty; give one, or leave it out")
        path = args.video or TOY / "clip.mp4"
        read_video(path, max_frames=1)      # a wrong file is told before a model is downloaded
        model, processor = load(args.model or (HUB_MODEL if args.video else TOY), None, args.device,
                                getattr(torch, args.dtype))
        video = read_video(path, processor.fps, args.frames or processor.max_frames,
                           processor.longest_edge)
        inputs = processor(video, args.question)
        features = model.encode(inputs.pixel_values.to(args.device))
        found = analyse(model, inputs.input_ids.to(args.device), features)
    answer = processor.decode(found["answer_ids"])
    if args.json:
        print(json.dumps({"video": str(path), "question": args.question, "answer": answer} | found))
    else:
        texts = [processor.token_text(token_id) for token_id in inputs.input_ids[0].tolist()]
        print(report(found, texts, f"its own answer, {answer!r}"))


if __name__ == "__main__":
    main()
