// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.28;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IERC1271} from "@openzeppelin/contracts/interfaces/IERC1271.sol";

/// @dev Keys first, then ERC-1271. OpenZeppelin's SignatureChecker asks for code first, which costs 2,600 gas an entry
/// and locks out an account that has delegated its code (EIP-7702) but still signs with its key. The static call is
/// bounded in gas and reads one word, so a hostile signer can neither spend the batch's gas nor revert it.
library Signatures {
    uint256 internal constant MAX_1271_GAS = 100_000;

    function isValid(address signer, bytes32 digest, bytes calldata signature) internal view returns (bool valid) {
        (address recovered, ECDSA.RecoverError error_,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (error_ == ECDSA.RecoverError.NoError && recovered == signer) return true;
        if (signer.code.length == 0) return false;
        bytes memory data = abi.encodeCall(IERC1271.isValidSignature, (digest, signature));
        bytes4 yes = IERC1271.isValidSignature.selector;
        assembly ("memory-safe") {
            mstore(0, 0)
            let answered := staticcall(MAX_1271_GAS, signer, add(data, 0x20), mload(data), 0, 0x20)
            valid := and(and(answered, gt(returndatasize(), 0x1f)), eq(mload(0), yes))
        }
    }
}
