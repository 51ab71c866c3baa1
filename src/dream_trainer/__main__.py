"""``python -m dream_trainer``, as launchers that take a module start ``dream-trainer``."""

from dream_trainer.cli import main

if __name__ == "__main__":
    main()
