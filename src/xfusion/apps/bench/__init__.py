"""The measurements of `xfusion bench`: one file per question with ``measure(bench)``, each against a peer in the same run."""
