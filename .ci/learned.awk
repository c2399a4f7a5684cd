# Fails unless the last line of what the demo printed says that the policy began as it should, and has learned.
{ last = $0 }
END {
    split(last, word, " ")
    said = last ~ /^optimality: [0-9]\.[0-9]+ -> [0-9]\.[0-9]+$/
    if (!(said && word[2] >= 0.2 && word[2] <= 0.45 && word[4] >= 0.9)) {
        print "The demo did not go from about 0.3 to at least 0.9." > "/dev/stderr"
        exit 1
    }
}
