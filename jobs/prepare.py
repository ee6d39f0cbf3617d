"""Write resized Parquet shards, to save the decoding of full-size images in every epoch.

    python jobs/prepare.py data.uri=FOLDER out=DIR image_size=256

Then pre-train with data.uri=DIR. Corrupt images are skipped and listed in DIR/skipped.jsonl.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.prepare import PrepareSettings, prepare


def main(*settings: str) -> None:
    print(prepare(load(PrepareSettings, None, settings)))


if __name__ == "__main__":
    run_command(main)
