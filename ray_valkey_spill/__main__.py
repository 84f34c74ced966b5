"""`python -m ray_valkey_spill`, the same as `ray-valkey-spill`."""

from ray_valkey_spill.cli import main

if __name__ == "__main__":
    main()
