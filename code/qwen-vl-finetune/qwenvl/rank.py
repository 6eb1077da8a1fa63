"""One process of a training run, as qwenvl.launch starts it: it ends with its launcher, also while it still imports."""

from .signals import die_with_launcher


def main() -> None:
    die_with_launcher()
    from .failing import run_rank  # from here on whatever goes wrong is reported in one line

    def train() -> None:
        from .train import main

        main()

    run_rank(train)


if __name__ == "__main__":
    main()
