rule Deep { strings: $a = { 00 ( 01 | ( 02 | ( 03 | 04 ) ) ) [0-] FF }
    condition: ((((((((((($a or (not (not (not false)))))))))))))) }
