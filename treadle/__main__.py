"""`python -m treadle`, which is what torchrun starts: `torchrun --nproc-per-node 8 -m treadle train recipe.yaml`."""

from treadle.cli import main

if __name__ == "__main__":
    main()
