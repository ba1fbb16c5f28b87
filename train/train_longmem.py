"""Train a side network: `longmem train`, for those who start it from a checkout or with `accelerate launch`.

python train/train_longmem.py longmem/training/configs/python-manual.yaml
python train/train_longmem.py longmem/training/configs/books.yaml data.train=my-books data.validation=my-other-books
"""

import sys

from longmem.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
