"""A toy world: clips of coloured shapes that move or stay, with questions and their answers.

A clip is drawn from one seed, 8 s at 8 frames a second, 64 x 64 pixels, on a noisy grey background.
Everything about it is known, so that questions and right answers come with it.
"""

import random
from dataclasses import dataclass
from itertools import zip_longest

import av
from PIL import Image, ImageDraw

FPS, DURATION, SIZE = 8, 8, 64              # frames a second, seconds, pixels on each side
COLOURS = {"red": (215, 45, 45), "green": (50, 175, 70), "blue": (55, 95, 225),
           "yellow": (230, 210, 50), "purple": (155, 60, 190), "white": (240, 240, 240)}
SHAPES = ("cross", "ring", "square")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
UNSEEN = 10**9                              # training draws its clips from seeds below
HARD_NOISE = 120                            # grey levels; a clip has 5 to 20 of its own
SCALE = 4                                   # shapes are drawn this much larger, then averaged


@dataclass(frozen=True)
class Shape:
    colour: str
    form: str                               # one of SHAPES
    direction: str                          # one of DIRECTIONS, or "still"
    turns: bool                             # goes back to where it started
    appears: float                          # seconds
    start: tuple[float, float]              # centre when it appears, pixels from the top left
    distance: float                         # from there to the farthest point, pixels
    radius: float                           # pixels from the centre to the edge

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"

    def centre(self, seconds: float) -> tuple[float, float]:
        dx, dy = DIRECTIONS.get(self.direction, (0, 0))
        share = max(0.0, seconds - self.appears) / (DURATION - self.appears)
        if self.turns:
            share = 1 - abs(1 - 2 * share)
        travelled = self.distance * share
        return self.start[0] + dx * travelled, self.start[1] + dy * travelled

    def place(self, seconds: float) -> str:
        """In which ninth of the frame the centre is: "top left", "top", ..., "middle", ..."""
        x, y = (min(2, int(3 * coordinate / SIZE)) for coordinate in self.centre(seconds))
        return f"{('top', '', 'bottom')[y]} {('left', '', 'right')[x]}".strip() or "middle"

    def draw(self, canvas: ImageDraw.ImageDraw, seconds: float) -> None:
        x, y = (SCALE * coordinate for coordinate in self.centre(seconds))
        r, fill = SCALE * self.radius, COLOURS[self.colour]
        if self.form == "ring":
            canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.45 * r))
        elif self.form == "square":
            canvas.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        else:
            canvas.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
            canvas.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


class Clip:
    """One clip of the world, of `count` shapes with different colours and different forms.

    noise: 0 to 255, the share of every pixel that is a random grey; it leaves all else as it is.
    """

    def __init__(self, seed: int, count: int, noise: int | None = None):
        rng = random.Random(seed)
        self.seed, self.grey, self.noise = seed, rng.randint(15, 75), rng.randint(5, 20)
        if noise is not None:
            self.noise = noise
        forms = sorted(rng.sample(SHAPES, count))
        colours = rng.sample(list(COLOURS), count)
        late = rng.randrange(count) if count > 1 and rng.random() < 0.5 else None
        while True:
            self.shapes = [self._place(rng, colour, form, n == late)
                           for n, (colour, form) in enumerate(zip(colours, forms))]
            if self._apart():
                break

    @staticmethod
    def _place(rng: random.Random, colour: str, form: str, late: bool) -> Shape:
        direction = rng.choice([*DIRECTIONS, *DIRECTIONS, "still", "still", "still", "still"])
        turns = direction != "still" and not late and rng.random() < 0.5
        appears = rng.uniform(2, 4) if late else 0.0
        radius, distance = rng.uniform(7, 10), rng.uniform(20, 36)
        low, high = radius * 1.1, SIZE - radius * 1.1
        start = [rng.uniform(low, high), rng.uniform(low, high)]
        for axis, step in enumerate(DIRECTIONS.get(direction, (0, 0))):
            if step:                        # the whole way must lie inside the frame
                first, last = (low + distance, high) if step < 0 else (low, high - distance)
                start[axis] = rng.uniform(first, last)
        return Shape(colour, form, direction, turns, appears, tuple(start), distance, radius)

    def _apart(self) -> bool:
        """No two shapes touch, at any half second."""
        for seconds in (n / 2 for n in range(2 * DURATION + 1)):
            for i, a in enumerate(self.shapes):
                for b in self.shapes[:i]:
                    (ax, ay), (bx, by) = a.centre(seconds), b.centre(seconds)
                    if max(abs(ax - bx), abs(ay - by)) < 1.1 * (a.radius + b.radius):
                        return False
        return True

    def visible(self, index: int) -> list[Shape]:
        return [shape for shape in self.shapes if shape.appears <= index / FPS]

    def frame(self, index: int) -> Image.Image:
        """Frame number `index` (0 .. FPS * DURATION - 1), RGB, 64 x 64."""
        canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), (self.grey,) * 3)
        for shape in self.visible(index):
            shape.draw(ImageDraw.Draw(canvas), index / FPS)
        rng = random.Random(self.seed * 1000 + index)
        noise = Image.frombytes("L", (SIZE, SIZE), rng.randbytes(SIZE * SIZE))
        return Image.blend(canvas.reduce(SCALE), noise.convert("RGB"), self.noise / 255)

    def write(self, path) -> None:
        """The whole clip as an H.264 mp4."""
        with av.open(str(path), "w", format="mp4") as file:
            # Bytes vary from run to run with more than one thread, and with x264's vector code on
            # some processors: so one thread, and its plain C, which is the same everywhere.
            stream = file.add_stream("libx264", rate=FPS,
                                     options={"crf": "23", "x264-params": "asm=0"})
            stream.codec_context.thread_count = 1
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for index in range(FPS * DURATION):
                file.mux(stream.encode(av.VideoFrame.from_image(self.frame(index))))
            file.mux(stream.encode())

    def description(self) -> str:
        does = []
        for s in self.shapes:
            way = "stays still" if s.direction == "still" else f"moves {s.direction}"
            does.append(f"a {s.name} {way}" + " and back" * s.turns)
        text = ", ".join(does[:-1]) + ", and " * (len(does) > 1) + does[-1]
        return text[0].upper() + text[1:] + "."

    def questions(self, index: int | None = None) -> list[Question]:
        """Every question that the clip answers, or that its frame number `index` does alone."""
        whole = index is None
        shapes = self.shapes if whole else self.visible(index)
        count = ("none", "one", "two", "three")[len(shapes)]
        found = [Question("count", "How many shapes are there?", count)]
        for s in shapes:
            found += [Question("colour", f"What colour is the {s.form}?", s.colour),
                      Question("shape", f"What shape is {s.colour}?", s.form)]
            if not whole:
                found.append(Question("place", f"Where is the {s.form}?", s.place(index / FPS)))
                continue
            moves = s.direction != "still"
            found.append(Question("moves", f"Does the {s.form} move?", "Yes" if moves else "No"))
            if moves:
                asked = f"Which way does the {s.form} move first?"
                found.append(Question("direction", asked, s.direction))
                answer = "Yes" if s.turns else "No"
                found.append(Question("turns", f"Does the {s.form} turn back?", answer))
            if s.appears:
                found.append(Question("appears", "Which shape appears later?", s.form))
        for colour in COLOURS:
            answer = "Yes" if colour in {s.colour for s in shapes} else "No"
            found.append(Question("is there", f"Is anything {colour}?", answer))
        if whole:
            found.append(Question("describe", "What happens in this video?", self.description()))
        return found

    def sample_questions(self, n: int, rng: random.Random) -> list[Question]:
        """n about the whole clip: one of every kind first, then another of every kind."""
        by_kind = {}
        for question in rng.sample(self.questions(), len(self.questions())):
            by_kind.setdefault(question.kind, []).append(question)
        turns = zip_longest(*by_kind.values())
        return [question for turn in turns for question in turn if question][:n]
