# python -m minisweet.export: what it does is in use/export.py
from minisweet.use.export import main, run_command

if __name__ == "__main__":
    run_command(main)
