# python -m minisweet.reproduce: what it does is in paper/reproduce.py
from minisweet.paper.reproduce import main, run_command

if __name__ == "__main__":
    run_command(main)
