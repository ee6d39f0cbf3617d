"""Write resized Parquet shards, so that later epochs do not pay for decoding full-size pictures.

    python jobs/prepare.py data.uri=FOLDER out=DIR image_size=256

Then pre-train with data.uri=DIR. Broken pictures are left out and named in DIR/skipped.jsonl.
"""

from raycluster.cli import run_command
from raycluster.config import load
from raycluster.distributed.prepare import PrepareSettings, prepare


def main(*settings: str) -> None:
    print(prepare(load(PrepareSettings, None, settings)))


if __name__ == "__main__":
    run_command(main)
