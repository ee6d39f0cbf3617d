"""Write resized Parquet shards, so that epochs need not decode full-size images.

    python jobs/prepare.py data.uri=FOLDER out=DIR image_size=256

Then pre-train with data.uri=DIR. Broken images are skipped and listed in DIR/skipped.jsonl.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.prepare import PrepareSettings, prepare


def main(*settings: str) -> None:
    print(prepare(load(PrepareSettings, None, settings)))


if __name__ == "__main__":
    run_command(main)
