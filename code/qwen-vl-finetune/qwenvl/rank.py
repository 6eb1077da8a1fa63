"""One process of a training run, as qwenvl.launch starts it. It ends with its launcher, even during imports."""

from .signals import die_with_launcher


def main() -> None:
    die_with_launcher()
    from .failing import run_rank  # from here on every error is reported in one line

    def train() -> None:
        from .train import main

        main()

    run_rank(train)


if __name__ == "__main__":
    main()
