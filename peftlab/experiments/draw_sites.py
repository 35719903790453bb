"""Draw the README's picture of the five sites: `python -m peftlab.experiments.draw_sites`."""

import base64
import json

from peftlab import figures
from peftlab.bases import load
from peftlab.bases.data import data_path
from peftlab.experiments.run_notebooks import camera


def main() -> None:
    figure = json.loads(figures.site_map(load("tiny-gpt"), dark=False).to_json())
    with camera() as picture:
        data_path("results", "five_sites.png").write_bytes(base64.b64decode(picture(figure)))


if __name__ == "__main__":
    main()
