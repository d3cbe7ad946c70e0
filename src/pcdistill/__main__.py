"""`python -m pcdistill`: the command line, for launchers too (`accelerate launch -m pcdistill ...`)."""

from pcdistill.cli import main

if __name__ == "__main__":
    main()
