"""The HTTP server: recommendations from the reference policy, feedback into Kafka.

``app`` is the API, ``service`` what a request goes through, ``batching`` gathers concurrent requests into one
decode, ``swap`` keeps the policy that the ledger names, ``events`` records to Kafka without anyone waiting,
``metrics`` counts. Importing this package imports nothing.
"""
