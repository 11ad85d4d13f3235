"""The shaped reward of a response: ordered terms, and a ledger of what each of them added."""
