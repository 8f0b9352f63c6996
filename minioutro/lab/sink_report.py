"""Four tables about the attention sink of any checkpoint.

    python -m minioutro.lab.sink_report                                   the toy and its clip
    python -m minioutro.lab.sink_report VIDEO "QUESTION" --model FOLDER   any SmolVLM2 checkpoint
"""

import argparse
from dataclasses import dataclass, replace

import torch
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
    singular_entropy,
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
from minioutro.support.cli import (
    Parser,
    add_model_options,
    add_video_options,
    not_empty,
    print_json,
    progress,
    run_command,
)
from minioutro.weights import HUB_MODEL, TOY

FIND_ONLY = OutRo(relax=False, align=False)         # finds the sinks and changes nothing
UNSCORED = 16           # the first tokens of a text are not scored: they have too little context
ZEROED = (1, 2, 8)      # how many coordinates of each key are set to zero
STRENGTHS = (0.5, 1, 3)                             # strengths of the alignment (gamma)


@torch.inference_mode()
def analyse(model: VideoLM, input_ids: Tensor, features: Tensor | None = None) -> dict:
    """The four tables of `python -m minioutro.lab.sink_report`, about one prompt or one text.

    input_ids: int64[1,S]; features: float[1,F*M,C] of `encode`. With features, the losses are those
    of the model's own greedy answer. Without features, they are those of the text itself, after its
    first UNSCORED tokens and after its sink.
    Returns: a row for each layer in "who" and "holds" (tables 1 and 2), one for each way to take a
    token away in "without" (table 3) and one for each setting of OutRo in "outro" (table 4). The
    other entries describe the sink and the scored tokens. A change of the loss is a pair: its mean
    over the scored tokens, and the standard error of that mean.
    Raises: ValueError for a text that is too short, or in which every token is a sink.
    """
    if features is None:
        asked = text_to_continue(input_ids)
    else:
        asked = prompt_with_answer(model, input_ids, features)
    sink, tokens, who, holds = look_inside(model, asked)
    baseline = Baseline(model, scored_after(asked, sink.position))
    return {"marked": sink.marked,
            "position": sink.position,
            "layer": sink.layer,
            "ratio": sink.ratio,
            "activation": sink.activation,
            "coordinate": tokens[0].coordinate,
            "written by": tokens[0].writer,
            "who": who,
            "holds": holds,
            "others": [token.position for token in tokens[1:]],
            "answer_ids": [] if features is None else asked.answer_ids[0].tolist(),
            "tokens": len(baseline.losses),
            "loss": baseline.losses.mean().item(),
            "without": cut_tokens(model, baseline, tokens),
            "outro": try_outro(model, baseline, sink),
            "width": model.config.text_config.hidden_size}


# ---- What is read: a prompt with the model's answer, or a text ----------------------------------


def prompt_with_answer(model: VideoLM, input_ids: Tensor, features: Tensor) -> Examples:
    """The prompt and the model's own greedy answer."""
    answer_ids = torch.tensor([model.generate(input_ids, features=features)],
                              device=input_ids.device)
    return Examples(input_ids, features, answer_ids, torch.ones_like(answer_ids).bool())


def text_to_continue(input_ids: Tensor) -> Examples:
    """A text without a video. Its last token is treated as the answer, all others as the prompt."""
    length = input_ids.shape[1]
    if length < UNSCORED + 2:
        raise ValueError(f"a text of {length} tokens is too short; give a longer one")
    answer_ids = input_ids[:, -1:]
    return Examples(input_ids[:, :-1], None, answer_ids, torch.ones_like(answer_ids).bool())


def first_scored(asked: Examples, sink: int) -> int:
    """The position of the first token that has a loss."""
    if asked.features is not None:
        return asked.input_ids.shape[1]
    return max(UNSCORED, sink + 1)


def scored_after(asked: Examples, sink: int) -> Examples:
    """The same examples, but every token from `first_scored` on has a loss."""
    both_ids = asked.both_ids
    n_scored = both_ids.shape[1] - first_scored(asked, sink)
    return replace(asked, is_scored=torch.ones_like(both_ids[:, -n_scored:]).bool())


# ---- The sink, the tokens it is compared with, and which layer wrote them -----------------------


@dataclass
class Sink:
    marked: bool            # False: the rule marks no token, and this one comes nearest to it
    position: int
    layer: int              # where its ratio is largest
    ratio: float            # its max |h| divided by the median |h|, there
    activation: float       # its max |h|, there
    dimensions: Tensor      # int64[2], its two largest coordinates, there


@dataclass
class Token:
    """A token that table 3 takes away."""
    position: int
    coordinate: int         # of its vector: a large one, in the layer where the sink is largest
    writer: int             # the layer whose MLP added most to that coordinate. -1: the embedding


def look_inside(model: VideoLM, asked: Examples) -> tuple[Sink, list[Token], list, list]:
    """Read the prompt once with a trace, and take from it all that tables 1 to 3 need.

    The trace of a long prompt has gigabytes, so it does not leave this function.
    Returns: the sink, the tokens of table 3 (the sink first), the rows of table 1 and of table 2.
    """
    trace, cache = {}, Cache()
    model.hidden_states(asked.input_ids, features=asked.features, outro=FIND_ONLY, cache=cache,
                        trace=trace)
    L = model.config.text_config.num_hidden_layers
    is_sink = torch.cat([trace[f"layers.{l}.is_sink"] for l in range(L)])               # (L,S)
    sink = find_sink(trace, is_sink)
    others = ordinary_tokens(is_sink.any(0), sink.position, first_scored(asked, sink.position))
    given = sources(model, trace, [sink.position, *others])                             # (L,N,C)
    tokens = find_writers(trace, given, sink, others)

    added = [*given[1:, 0, tokens[0].coordinate].tolist(), None]    # None: no layer after the last
    who, holds = [], []
    for l in range(L):
        mass, to_sink = attention_of_heads(model, trace, cache, l, sink.position)
        who.append(who_is_a_sink(trace, l, mass, sink) | {"MLP adds": added[l]})
        holds.append(what_it_holds(trace, cache, l, mass, to_sink, sink.position))
    return sink, tokens, who, holds


def find_sink(trace: dict, is_sink: Tensor) -> Sink:
    """The token with the largest ratio among those that the rule marks.

    If it marks none, the token with the largest ratio in the layers that the rule searches.
    is_sink: bool[L,S].
    """
    L, S = is_sink.shape
    ratio = torch.cat([trace[f"layers.{l}.ratio"] for l in range(L)]).nan_to_num()      # (L,S)
    marked = is_sink.any().item()
    if marked:
        candidates = ratio.masked_fill(~is_sink, 0)
    else:
        candidates = ratio[:max(1, L - FIND_ONLY.skip_last)]
    layer, position = divmod(candidates.argmax().item(), S)
    hidden = trace[f"layers.{layer}.hidden"][:, [position]]                             # (1,1,C)
    return Sink(marked, position, layer, ratio[layer, position].item(), hidden.abs().max().item(),
                sink_dimensions(hidden))


def ordinary_tokens(is_marked: Tensor, sink: int, end: int) -> list[int]:
    """Three tokens that are not sinks: a quarter, a half and three quarters of the way through.

    is_marked: bool[S], sinks in any layer; end: the first position that may not be chosen.
    """
    ordinary = [i for i in range(end) if i != sink and not is_marked[i]]
    if not ordinary:
        raise ValueError(f"all of the first {end} tokens are sinks, so no other token is left to "
                         f"compare them with; give a longer prompt")
    return [ordinary[len(ordinary) * quarters // 4] for quarters in (1, 2, 3)]


def sources(model: VideoLM, trace: dict, positions: list[int]) -> Tensor:
    """What the embedding, and then the MLP of each layer but the last, add to these N tokens.

    Only item 0 of the batch is looked at. Returns: float[L,N,C]. Entry 0 is the embedding, and
    entry l + 1 is what the MLP of layer l adds.
    """
    given = [trace["layers.0.hidden"][0, positions]]
    for l, layer in enumerate(model.model.text_model.layers[:-1]):
        out = merge_heads(trace[f"layers.{l}.out"])[0, positions]                       # (N,H*D)
        attended = trace[f"layers.{l}.hidden"][0, positions] + layer.self_attn.o_proj(out)
        given.append(trace[f"layers.{l + 1}.hidden"][0, positions] - attended)
    return torch.stack(given)


def find_writers(trace: dict, given: Tensor, sink: Sink, others: list[int]) -> list[Token]:
    """A large coordinate of the sink and of each other token, and the layer that wrote it.

    given: float[L,N,C] of `sources`, the sink first. For the other tokens, the sink's coordinate is
    not considered: to silence the row of weights that writes it would take the sink away as well.
    """
    sink_coordinate = sink.dimensions[0].item()
    hidden = trace[f"layers.{sink.layer}.hidden"][0]                                    # (S,C)
    given = given[:sink.layer + 1].abs()                # what was added before this layer
    tokens = []
    for n, position in enumerate([sink.position, *others]):
        magnitude = hidden[position].abs()
        if n == 0:
            coordinate = sink_coordinate
        else:
            magnitude[sink_coordinate] = 0
            coordinate = magnitude.argmax().item()
        writer = given[:, n, coordinate].argmax().item() - 1
        tokens.append(Token(position, coordinate, writer))
    return tokens


# ---- Tables 1 and 2: who is a sink, and what it holds -------------------------------------------


def weights_by_head(model: VideoLM, trace: dict, cache: Cache, l: int):
    """Yield the attention weights of each head of layer l, float[B,1,S,S].

    They are computed again, one head at a time, from the layer's input and the cached keys. For a
    long prompt, the weights of all heads together would take gigabytes.
    """
    text = model.config.text_config
    H = text.num_attention_heads
    layer = model.model.text_model.layers[l]
    hidden = trace[f"layers.{l}.hidden"]                                                # (B,S,C)
    S = hidden.shape[1]
    positions = torch.arange(S, device=hidden.device)[None, None]                       # (1,1,S)
    cos, sin = rope_tables(positions, text.head_dim, text.rope_theta, like=hidden)
    q = rotate(split_heads(layer.self_attn.q_proj(layer.input_layernorm(hidden)), H), cos, sin)
    k = repeat_heads(cache.keys(l), H)
    v = repeat_heads(cache.values(l), H)
    may_attend = causal_mask(S, S, hidden.device)
    for h in range(H):
        _, weights = attention(q[:, [h]], k[:, [h]], v[:, [h]], may_attend)
        yield weights


def attention_of_heads(model: VideoLM, trace: dict, cache: Cache, l: int,
                       sink: int) -> tuple[Tensor, Tensor]:
    """The `attention_mass` of every token in layer l, and the weight of each query on the sink.

    Returns: float32[1,H,S] and float32[1,H,S].
    """
    masses, to_sink = [], []
    for weights in weights_by_head(model, trace, cache, l):
        masses.append(attention_mass(weights))
        to_sink.append(weights[:, :, :, sink].clone())      # a view would keep all weights alive
    return torch.cat(masses, dim=1).float(), torch.cat(to_sink, dim=1).float()


def who_is_a_sink(trace: dict, l: int, mass: Tensor, sink: Sink) -> dict:
    """The row of layer l in table 1, except its last column. mass: float[1,H,S]."""
    hidden = trace[f"layers.{l}.hidden"].float()
    ratio = trace[f"layers.{l}.ratio"][0]                                               # (S,)
    found = detectors(hidden, mass, sink.dimensions)
    can_exceed_20 = hidden.shape[-1] > 400
    definitions = {"activation": found["activation"],
                   "attention": found["attention"],
                   "dimension": found["phi > 20" if can_exceed_20 else "dimensions"]}
    marked = {name: positions_of(is_sink[0]) for name, is_sink in definitions.items()}
    others = torch.cat([hidden[:, :sink.position], hidden[:, sink.position + 1:]], dim=1)
    return {"layer": l,
            **marked,
            "overlap": overlap(*definitions.values()),
            "heads": sink_share(mass)[0, sink.position].item(),
            "entropy": singular_entropy(hidden).item(),
            "others": singular_entropy(others).item(),
            "ratio": ratio.max().item(),
            "at": ratio.argmax().item()}


def what_it_holds(trace: dict, cache: Cache, l: int, mass: Tensor, to_sink: Tensor,
                  sink: int) -> dict:
    """The row of layer l in table 2. mass, to_sink: float[1,H,S] of `attention_of_heads`."""
    k = cache.keys(l).float().norm(dim=-1)                                              # (1,G,S)
    v = cache.values(l).float()                                                         # (1,G,S,D)
    out = trace[f"layers.{l}.out"].float()                                              # (1,H,S,D)
    v_sink = v[:, :, sink]                                                              # (1,G,D)
    v_ratio, variance = nop_or_broadcast(out, v, v_sink)
    v_length = repeat_heads(v_sink.norm(dim=-1), out.shape[1])                          # (1,H)
    term = to_sink * v_length[:, :, None] / out.norm(dim=-1)                            # (1,H,S)
    term_of_median_query = term[:, :, sink:].median(-1).values                          # (1,H)
    return {"layer": l,
            "|k|": spread(k[:, :, sink] / k.median(-1).values),
            "|v|": spread(v_ratio),
            "variance": spread(variance),
            "term": spread(term_of_median_query),
            "attention": spread(mass[:, :, sink])}


def spread(x: Tensor) -> list[float]:
    """The smallest value, the median and the largest value."""
    return [x.min().item(), x.median().item(), x.max().item()]


def positions_of(is_sink: Tensor) -> list[int]:
    """bool[S] -> the positions that are True."""
    return is_sink.nonzero().flatten().tolist()


# ---- Tables 3 and 4: what happens without the sink, and with OutRo ------------------------------


class Baseline:
    """Logits and losses of the plain model. Every change is measured against them."""

    def __init__(self, model: VideoLM, asked: Examples):
        self.asked = asked
        self.logits = logits_of(model, asked)                                           # (1,n,V)
        self.losses = token_losses(self.logits, asked)[0]                               # (n,)

    def change(self, logits: Tensor) -> tuple[float, float]:
        """How much the loss rises, in nats a token, and the standard error of this mean."""
        difference = token_losses(logits, self.asked)[0] - self.losses                  # (n,)
        freedom = max(1, len(difference) - 1)
        error = difference.std(correction=0) / freedom**0.5
        return difference.mean().item(), error.item()


def cut_tokens(model: VideoLM, baseline: Baseline, tokens: list[Token]) -> list[dict]:
    """Table 3: a row for each way to take a token away, a column for each token."""
    columns = {}
    for token in progress(tokens, "cuts"):
        columns[f"token {token.position}"] = cut(model, baseline, token)
    ways = next(iter(columns.values()))
    return [{"": way} | {name: column[way] for name, column in columns.items()} for way in ways]


def cut(model: VideoLM, baseline: Baseline, token: Token) -> dict:
    """How the loss changes with each way to take this token away."""
    asked, position = baseline.asked, token.position
    L = model.config.text_config.num_hidden_layers
    masks = [mask_without(asked, position)] * L
    without, marked_then = left_out(model, baseline, position)
    changes = {"column masked": baseline.change(logits_of(model, asked, masks=masks)),
               "left out": without,
               "marked then": marked_then,
               "writing row silenced": None}            # stays None if the embedding wrote it
    if token.writer >= 0:
        silenced = without_row(model, token.writer, token.coordinate)
        changes["writing row silenced"] = baseline.change(logits_of(silenced, asked))
    for n in ZEROED:
        logits = logits_of(model, asked, zero_keys=(range(L), position, n))
        changes[f"Zero-K, {n} of each key"] = baseline.change(logits)
    return changes


def mask_without(asked: Examples, position: int) -> Tensor:
    """The causal mask over prompt and answer in which no later token sees this one."""
    length = asked.both_ids.shape[1]
    mask = causal_mask(length, length, asked.input_ids.device)
    mask[position + 1:, position] = False
    return mask


def left_out(model: VideoLM, baseline: Baseline,
             position: int) -> tuple[tuple[float, float], list[int]]:
    """The change of the loss without this token in the prompt, and the tokens that the rule then
    marks. Their positions are counted in the whole prompt.
    """
    shorter = without_token(baseline.asked, position, model.config.image_token_id)
    cache = Cache()
    change = baseline.change(logits_of(model, shorter, FIND_ONLY, cache=cache))
    marked = positions_of(cache.sinks.ever_sink[0])
    return change, [i if i < position else i + 1 for i in marked]


def without_token(asked: Examples, position: int, image_token_id: int) -> Examples:
    """The same examples without one token of the prompt. All later tokens move up by one."""
    input_ids = asked.input_ids
    keep = torch.arange(input_ids.shape[1], device=input_ids.device) != position
    features = asked.features
    if features is not None:
        is_image = input_ids[0] == image_token_id
        features = features[:, keep[is_image]]
    return replace(asked, input_ids=input_ids[:, keep], features=features)


def try_outro(model: VideoLM, baseline: Baseline, sink: Sink) -> list[dict]:
    """Table 4: a row for each part of the method and each strength.

    If the rule marks no token, its thresholds are lowered until it marks the nearest one.
    """
    rule = OutRo()
    if not sink.marked:
        rule = OutRo(abs_threshold=0.999 * sink.activation, median_multiple=0.999 * sink.ratio)
    settings = [("relax", replace(rule, align=False, gamma=0))]
    for way, relax in (("align", False), ("both", True)):
        settings += [(way, replace(rule, relax=relax, gamma=gamma)) for gamma in STRENGTHS]
    rows = []
    for way, outro in progress(settings, "OutRo"):
        logits = logits_of(model, baseline.asked, outro)
        is_changed = logits.argmax(-1) != baseline.logits.argmax(-1)                    # (1,n)
        share = is_changed.float().mean().item()
        rows.append({"": way,
                     "gamma": outro.gamma if outro.align else None,
                     "change": baseline.change(logits),
                     "largest move": (logits - baseline.logits).abs().max().item(),
                     "argmaxes": [share, (share * (1 - share) / is_changed.numel())**0.5]})
    return rows


# ---- As text ------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """The rows in aligned columns, which are named by the keys."""
    lines = [list(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(*lines)]
    aligned = []
    for first, *rest in lines:
        texts = [first.ljust(widths[0])]
        texts += [text.rjust(width) for text, width in zip(rest, widths[1:])]
        aligned.append("  ".join(texts))
    return "\n".join(aligned)


def cell(value) -> str:
    """One value of a row as text. A pair is a change with its error. Of a list, three are shown."""
    if value is None or value == []:
        return "-"
    if isinstance(value, tuple):
        change, error = value
        return f"{change:+.4f} ± {error:.4f}"
    if isinstance(value, list):
        shown = " ".join(cell(each) for each in value[:3])
        return shown if len(value) <= 3 else f"{shown} +{len(value) - 3}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value)


def report(found: dict, texts: list[str], scored: str) -> str:
    """The result of `analyse` as text.

    texts: the text of each token; scored: what the losses belong to, in words.
    """
    names = [f"token {i} {texts[i]!r}" for i in (found["position"], *found["others"])]
    limit = "20"
    if found["width"] <= 400:
        scaled = 20 / 64 * found["width"]**0.5
        limit = f"{scaled:.1f}: 20 cannot be reached below a width of 400"
    lowered = "" if found["marked"] else ", with thresholds that are lowered to this token"
    return f"""\
{sentence_about_the_sink(found, names[0])}

1. Who is a sink? The columns are: the positions that are marked by activation (OutRo's rule), by
the attention of half of the heads, and by dimension (phi > {limit}),
the overlap of these three, the share of the heads that give the sink over 0.3, the entropy of the
layer's singular values (0: all vectors lie on one line), the same without the sink, the largest
ratio and its position, and what the MLP adds to the sink's coordinate.
{table(found['who'])}

2. What does it hold? Each column has the smallest, the median and the largest value over the heads:
|k| and |v| divided by those of the median token, the share of the outputs' variance along its v,
the length of its term divided by that of the output, and the attention to it.
{table(found['holds'])}

3. What happens without it, and without {', '.join(names[1:])}?
The table has the change of the loss over {found['tokens']} tokens of {scored}.
The loss of the baseline is {found['loss']:.4f} nats a token.
{table(found['without'])}

4. What does OutRo do{lowered}? The columns are: the change of the loss, the largest move of a
logit, and the share of argmaxes that change, with its error.
{table(found['outro'])}"""


def sentence_about_the_sink(found: dict, name: str) -> str:
    beginning = "The sink is"
    if not found["marked"]:
        beginning = "The rule marks no token. The nearest, called the sink below, is"
    layer = found["written by"]
    writer = "the embedding" if layer < 0 else f"the MLP of layer {layer}"
    return (f"{beginning} {name}: {found['ratio']:,.0f} times the median in layer "
            f"{found['layer']},\n|h| {found['activation']:,.0f} in coordinate "
            f"{found['coordinate']}, written by {writer}.")


# ---- The command --------------------------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m minioutro.lab.sink_report", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("video", nargs="?", type=not_empty,
        help="a video, animation or picture (default: the bundled clip)")
    add("question", nargs="?", default=QUESTION,
        help="a question about it (default: %(default)s)")
    add_model_options(parser)
    add_video_options(parser)
    add("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_args()


def which_model(args: argparse.Namespace):
    """The checkpoint that --model names. The default is the toy for its own clip, else the hub's.
    """
    if args.model is not None:
        return args.model
    return TOY if args.video is None else HUB_MODEL


@torch.inference_mode()
def main() -> None:
    args = read_arguments()
    path = TOY / "clip.mp4" if args.video is None else args.video
    read_video(path, max_frames=1)      # a wrong file is reported before a model is downloaded
    model, processor = load(which_model(args), args.revision, args.device,
                            getattr(torch, args.dtype))
    fps = processor.fps if args.fps is None else args.fps
    max_frames = processor.max_frames if args.frames is None else args.frames
    video = read_video(path, fps, max_frames, processor.longest_edge)
    inputs = processor(video, args.question)
    features = model.encode(inputs.pixel_values.to(args.device))
    found = analyse(model, inputs.input_ids.to(args.device), features)
    answer = processor.decode(found["answer_ids"])
    if args.json:
        print_json({"video": str(path), "question": args.question, "answer": answer} | found)
    else:
        texts = [processor.token_text(token_id) for token_id in inputs.input_ids[0].tolist()]
        print(report(found, texts, f"its own answer, {answer!r}"))


if __name__ == "__main__":
    run_command(main, "sink_report.py")
