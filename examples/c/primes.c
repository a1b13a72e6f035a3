/* Reads a number from standard input and tells how many primes there are up to it. */
#include <stdio.h>
#include <stdlib.h>

#define LARGEST 100000000L /* a byte each: 100 MB */

int main(void)
{
    long limit, count = 0;
    if (scanf("%ld", &limit) != 1 || limit < 0 || limit > LARGEST) {
        fprintf(stderr, "wanted: a number from 0 to %ld\n", LARGEST);
        return 1;
    }
    char *composite = calloc(limit + 1, 1);
    if (!composite) {
        perror("calloc");
        return 1;
    }
    for (long n = 2; n <= limit; n++) {
        if (composite[n])
            continue;
        count++;
        for (long multiple = n * n; multiple <= limit; multiple += n)
            composite[multiple] = 1;
    }
    printf("%ld\n", count);
    return 0;
}
