"""Every node of a Ray cluster prepares the model: one table, one error that names a node.

::

    prepare_on_ray ── placed ──► a placement group, one actor on each node of it
          │  ▲                        │
          │  └── Look: events, result ┴── NodePreparer: boot.prepare, on that node
          └────► each node's Progress, ReadyModel or LoaderError

Bytes come from the origin and, with ``peers: ray``, from the other nodes.
"""
