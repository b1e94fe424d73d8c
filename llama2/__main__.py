"""`python -m llama2` and the `llama2` command."""

from llama2.cli.main import main

if __name__ == "__main__":
    main()
