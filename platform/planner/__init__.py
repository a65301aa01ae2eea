"""What a run would take on given machines, before any is rented."""
