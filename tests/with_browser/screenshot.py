"""Store a picture of the page. `python tests/with_browser/screenshot.py` writes minioutro/pictures/page.png.

The picture of the decoder that sees: `--model FOLDER --question "How many shapes are there?"
--sight "#layer=12&head=1&token=276&run=outro" --height 1510 --out minioutro/pictures/seeing.png`, with the
folder of `real_decoder.py --see`.
"""

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from chromium import Chromium  # noqa: E402

from minioutro import load, read_video  # noqa: E402
from minioutro.lab.page import write_page  # noqa: E402
from minioutro.support.cli import written_whole  # noqa: E402
from minioutro.weights import TOY  # noqa: E402

SIGHT = "#layer=2&head=1&token=275&run=outro"           # the layer that opens the row
PICTURE = ROOT / "minioutro" / "pictures" / "page.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=TOY)
    parser.add_argument("--question", default="What happens in this video?")
    parser.add_argument("--sight", default=SIGHT)
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--height", type=int, default=1530, help="of the browser, down to the last of the six steps")
    args = parser.parse_args()
    model, processor = load(args.model)
    video = read_video(TOY / "clip.mp4", longest_edge=processor.longest_edge)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sink.html"
        write_page(path, model, processor, video, args.question)
        browser = Chromium(width=1440, height=args.height)
        try:
            browser.open(path, args.sight)
            picture = Image.open(io.BytesIO(base64.b64decode(browser.screenshot())))
        finally:
            browser.close()
    # 256 colours. MAXCOVERAGE keeps rare ones, for example the orange of a sink
    picture = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with written_whole(args.out) as half:
        picture.save(half, optimize=True)
    print(f"{args.out}: {picture.width} x {picture.height}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
