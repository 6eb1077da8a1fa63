"""One process of an evaluation, as the launcher starts it. It ends with its launcher, even while it still imports."""

from qwen_vl_streaming.launch.signals import die_with_launcher


def main() -> None:
    die_with_launcher()
    from eval import program  # slow to import

    program()


if __name__ == "__main__":
    main()
