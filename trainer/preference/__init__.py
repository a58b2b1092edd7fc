"""Preference level: progressive Softmax-DPO.

A stage learns from one dataset table against the policy it starts from; the policy it ends with is the
reference of the next stage (Align3GR, section 3.3). ``loss`` holds the mathematics, ``samples`` turns a table
into token ids, ``stage`` runs one stage.
"""
