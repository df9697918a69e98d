# python -m minisweet.explain: what it does is in use/explain.py
from minisweet.use.explain import main, run_command

if __name__ == "__main__":
    run_command(main)
