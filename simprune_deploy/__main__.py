"""``python -m simprune_deploy``."""

from simprune_deploy.cli import main

if __name__ == "__main__":
    main()
