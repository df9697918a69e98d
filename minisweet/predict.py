# python -m minisweet.predict: what it does is in use/predict.py
from minisweet.use.predict import main, run_command

if __name__ == "__main__":
    run_command(main)
