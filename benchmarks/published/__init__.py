"""The published forms of the algorithms, written anew to be measured beside those here."""
