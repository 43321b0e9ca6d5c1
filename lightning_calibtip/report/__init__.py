"""Tables, figures and the record of a run."""
