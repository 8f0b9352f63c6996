"""The toy's world: clips of coloured shapes that move or stay, with questions and their answers.

A clip is drawn from one seed. It shows one to three shapes on a noisy grey background, for 8 s at
8 frames a second, 64 x 64 pixels. Everything about it is known, so its questions come with the
right answers.

    clip = Clip(seed=1, count=2)
    clip.frame(0)           # a picture
    clip.questions()        # [Question(kind="count", text="How many ...", answer="two"), ...]
    clip.write("clip.mp4")
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest

import av
from PIL import Image, ImageDraw

FPS = 8                                     # frames a second
DURATION = 8                                # seconds
SIZE = 64                                   # pixels on each side of a frame
COLOURS = {
    "red": (215, 45, 45),
    "green": (50, 175, 70),
    "blue": (55, 95, 225),
    "yellow": (230, 210, 50),
    "purple": (155, 60, 190),
    "white": (240, 240, 240),
}
SHAPES = ("cross", "ring", "square")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
UNSEEN = 10**9                              # training draws its clips from seeds below this one
HARD_NOISE = 120                            # more noise than in any clip of the training, see Clip
SCALE = 4                                   # shapes are drawn this many times larger, then averaged
NUMBERS = ("none", "one", "two", "three")
ROWS = ("top", "", "bottom")                # the names of the thirds of a frame
COLUMNS = ("left", "", "right")


@dataclass(frozen=True)
class Shape:
    colour: str                             # one of COLOURS
    form: str                               # one of SHAPES
    direction: str                          # one of DIRECTIONS, or "still"
    turns: bool                             # whether it goes back to where it started
    appears: float                          # seconds
    start: tuple[float, float]              # centre when it appears, pixels from the top left
    distance: float                         # from there to the farthest point, pixels
    radius: float                           # pixels from the centre to the edge

    @property
    def name(self) -> str:
        return f"{self.colour} {self.form}"

    def centre(self, seconds: float) -> tuple[float, float]:
        """x and y in pixels from the top left."""
        dx, dy = DIRECTIONS.get(self.direction, (0, 0))
        share = max(0.0, seconds - self.appears) / (DURATION - self.appears)
        if self.turns:
            share = 1 - abs(1 - 2 * share)
        travelled = self.distance * share
        x, y = self.start
        return x + dx * travelled, y + dy * travelled

    def place(self, seconds: float) -> str:
        """In which ninth of the frame the centre is: "top left", "top", ..., "middle", ..."""
        x, y = self.centre(seconds)
        column = COLUMNS[min(2, int(3 * x / SIZE))]
        row = ROWS[min(2, int(3 * y / SIZE))]
        if not row and not column:
            return "middle"
        return f"{row} {column}".strip()

    def draw(self, canvas: ImageDraw.ImageDraw, seconds: float) -> None:
        """Draw the shape on a canvas that is SCALE times as large as a frame."""
        x, y = (SCALE * coordinate for coordinate in self.centre(seconds))
        r = SCALE * self.radius
        fill = COLOURS[self.colour]
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
    """One clip of the world.

    seed: all random numbers of the clip come from it.
    count: number of shapes, 1 to 3. Their colours differ, and so do their forms.
    noise: 0 to 255. Every pixel is a mixture of the picture and a random grey. The share of the
    grey is noise / 255, for example 47 % for a noise of 120. The noise changes nothing else about
    the clip. None: the clip's own noise, 5 to 20.
    """

    def __init__(self, seed: int, count: int, noise: int | None = None):
        rng = random.Random(seed)
        self.seed = seed
        self.grey = rng.randint(15, 75)             # of the background
        own_noise = rng.randint(5, 20)              # always drawn, to keep later numbers the same
        self.noise = own_noise if noise is None else noise

        forms = sorted(rng.sample(SHAPES, count))
        colours = rng.sample(list(COLOURS), count)
        late = None                                 # which shape appears later, if one does
        if count > 1 and rng.random() < 0.5:
            late = rng.randrange(count)
        while True:
            self.shapes = []
            for n in range(count):
                self.shapes.append(self._place(rng, colours[n], forms[n], is_late=n == late))
            if self._apart():
                break

    @staticmethod
    def _place(rng: random.Random, colour: str, form: str, is_late: bool) -> Shape:
        """A shape whose whole path lies inside the frame."""
        # One shape in three stays still: "still" is 4 of these 12.
        direction = rng.choice([*DIRECTIONS, *DIRECTIONS, "still", "still", "still", "still"])
        turns = direction != "still" and not is_late and rng.random() < 0.5
        appears = rng.uniform(2, 4) if is_late else 0.0
        radius = rng.uniform(7, 10)
        distance = rng.uniform(20, 36)

        low = radius * 1.1                          # the least x or y of a centre
        high = SIZE - radius * 1.1
        start = [rng.uniform(low, high), rng.uniform(low, high)]
        for axis, step in enumerate(DIRECTIONS.get(direction, (0, 0))):
            if step < 0:
                start[axis] = rng.uniform(low + distance, high)
            elif step > 0:
                start[axis] = rng.uniform(low, high - distance)
        return Shape(colour, form, direction, turns, appears, tuple(start), distance, radius)

    def _apart(self) -> bool:
        """Whether no two shapes touch. This is checked at every half second."""
        for half_seconds in range(2 * DURATION + 1):
            for i, a in enumerate(self.shapes):
                for b in self.shapes[:i]:
                    ax, ay = a.centre(half_seconds / 2)
                    bx, by = b.centre(half_seconds / 2)
                    if max(abs(ax - bx), abs(ay - by)) < 1.1 * (a.radius + b.radius):
                        return False
        return True

    def visible(self, index: int) -> list[Shape]:
        """The shapes that have appeared by frame `index`."""
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
        """Write the whole clip as an H.264 mp4. The same clip always gives the same bytes."""
        with av.open(str(path), "w", format="mp4") as file:
            # With several threads, and with x264's vector code on some processors, the bytes differ
            # from run to run. So we use one thread and x264's plain C code.
            stream = file.add_stream("libx264", rate=FPS,
                                     options={"crf": "23", "x264-params": "asm=0"})
            stream.codec_context.thread_count = 1
            stream.width = SIZE
            stream.height = SIZE
            stream.pix_fmt = "yuv420p"
            for index in range(FPS * DURATION):
                file.mux(stream.encode(av.VideoFrame.from_image(self.frame(index))))
            file.mux(stream.encode())

    def description(self) -> str:
        """All shapes and what they do, in one sentence."""
        parts = []
        for shape in self.shapes:
            does = "stays still" if shape.direction == "still" else f"moves {shape.direction}"
            if shape.turns:
                does += " and back"
            parts.append(f"a {shape.name} {does}")
        *first, last = parts
        text = f"{', '.join(first)}, and {last}" if first else last
        return text[0].upper() + text[1:] + "."

    def questions(self, index: int | None = None) -> list[Question]:
        """All questions about the whole clip, or only about its frame number `index`."""
        shapes = self.shapes if index is None else self.visible(index)
        found = [Question("count", "How many shapes are there?", NUMBERS[len(shapes)])]
        for shape in shapes:
            found.append(Question("colour", f"What colour is the {shape.form}?", shape.colour))
            found.append(Question("shape", f"What shape is {shape.colour}?", shape.form))
            if index is None:
                found += self._questions_of_time(shape)
            else:
                place = shape.place(index / FPS)
                found.append(Question("place", f"Where is the {shape.form}?", place))
        colours_there = {shape.colour for shape in shapes}
        for colour in COLOURS:
            answer = "Yes" if colour in colours_there else "No"
            found.append(Question("is there", f"Is anything {colour}?", answer))
        if index is None:
            found.append(Question("describe", "What happens in this video?", self.description()))
        return found

    @staticmethod
    def _questions_of_time(shape: Shape) -> list[Question]:
        """The questions about one shape that cannot be answered from a single frame."""
        if shape.direction == "still":
            found = [Question("moves", f"Does the {shape.form} move?", "No")]
        else:
            turns = "Yes" if shape.turns else "No"
            found = [
                Question("moves", f"Does the {shape.form} move?", "Yes"),
                Question("direction", f"Which way does the {shape.form} move first?",
                         shape.direction),
                Question("turns", f"Does the {shape.form} turn back?", turns),
            ]
        if shape.appears:
            found.append(Question("appears", "Which shape appears later?", shape.form))
        return found

    def sample_questions(self, n: int, rng: random.Random) -> list[Question]:
        """n questions about the whole clip: one of every kind first, then a second of every kind,
        and so on."""
        questions = self.questions()
        by_kind = defaultdict(list)
        for question in rng.sample(questions, len(questions)):
            by_kind[question.kind].append(question)
        found = []
        for one_of_each in zip_longest(*by_kind.values()):
            found += [question for question in one_of_each if question is not None]
        return found[:n]
