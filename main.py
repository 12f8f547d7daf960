"""The command line: `python main.py --help`."""

from flow_lightning.cli import main

if __name__ == "__main__":
    main()
