"""What `xfusion bench` measures: a file per question, each with ``measure(bench)``; all against a peer in the same run."""
