"""Evaluation: accuracy and attack success of a model, detection metrics of a score.

It judges what a run did: it knows what is poisoned, which no defence does. It may import everything up to `sweep`, and
`report` and `runs` import it. Begin with `evaluate` in `classifier`, which measures a network, and `detection_metrics`
in `detection`, which needs nothing but arrays.
"""
