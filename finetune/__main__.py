"""`python -m finetune`, and `accelerate launch -m finetune run RECIPE` for several processes."""

from finetune.cli.main import main

if __name__ == "__main__":
    main()
