"""The command line: `python main.py --help`. The same as `flow-lightning` and `python -m flow_lightning`."""

from flow_lightning.__main__ import main

if __name__ == "__main__":
    main()
