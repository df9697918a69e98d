# python -m minisweet.gradients: what it does is in paper/gradients.py
from minisweet.paper.gradients import main, run_command

if __name__ == "__main__":
    run_command(main)
