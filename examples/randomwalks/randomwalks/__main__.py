"""`python -m randomwalks`: the demo."""

import os
import sys

if __name__ == "__main__":
    # Threads that wait for each other should sleep: spinning, they would take the cores that the API and the
    # worker need too. OpenMP reads this when torch is loaded, so it stands before the import; the engine
    # inherits it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from randomwalks.demo import main

    sys.exit(main())
